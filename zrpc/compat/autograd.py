"""torch.distributed.autograd: zrpc's, under all of torch's names."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

from zrpc import autograd
from zrpc.autograd import (
    DistAutogradContext,
    _current_context,
    _get_debug_info,
    _get_max_id,
    _init,
    _is_valid_context,
    _new_context,
    _release_context,
    _retrieve_context,
    context,
    is_available,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DistAutogradContext",
    "_current_context",
    "_get_debug_info",
    "_get_max_id",
    "_init",
    "_is_valid_context",
    "_new_context",
    "_release_context",
    "_retrieve_context",
    "backward",
    "context",
    "get_gradients",
    "is_available",
]


def _callable_when_compiled(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function` for Python, and for compiled code, which calls back into Python.

    Args:
        function: what is called.
        name: what it is called in graphs of compiled code.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    called.__name__ = name
    called.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    ignored: Callable[..., Any] = torch.jit.ignore(called)  # type: ignore[no-untyped-call]
    return ignored


get_gradients = _callable_when_compiled(autograd.get_gradients, "get_gradients")
backward = _callable_when_compiled(autograd.backward, "dist_backward")
