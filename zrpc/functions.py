"""Marks on functions that are called remotely."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
