"""Marks on functions that are called remotely, and their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeVar

ASYNC_ATTRIBUTE = "_wrapped_async_rpc_function"
"""What `async_execution` leaves on a function; the name is torch's, whose decorator works here too."""

F = TypeVar("F", bound=Callable[..., Any])


def async_execution(fn: F) -> F:
    """Say that `fn` returns a `torch.futures.Future` whose value, once there, is the call's result.

    The callee answers when the future is done, and no handler thread waits for it. Put this decorator inside
    `@staticmethod` and `@classmethod`.

    Returns:
        A wrapper of `fn`; pass the wrapper to `rpc_sync`, `rpc_async` or `remote`.

    Raises:
        RuntimeError: on the caller, where `fn` returned something else than a future.
    """

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    wrapper._wrapped_async_rpc_function = fn  # type: ignore[attr-defined]  # the mark, under torch's name
    return wrapper  # type: ignore[return-value]


_NAMED = frozenset({FunctionType, BuiltinFunctionType, MethodType, type})


def name_of(func: object) -> str:
    """How `func` is called in texts for people; an object that can be called has the name of its class.

    No code of users runs: their classes may say anything of the attributes of an object.
    """
    name: str = func.__qualname__ if type(func) in _NAMED else type(func).__qualname__  # type: ignore[attr-defined]
    return name
