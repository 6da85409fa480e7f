"""Distributed autograd: `context`, `backward`, `get_gradients`, under the names of torch.distributed.autograd.

The names are looked up when they are first used, so importing this package alone brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zrpc.autograd.dist_context import DistAutogradContext as DistAutogradContext
    from zrpc.autograd.interface import _current_context as _current_context
    from zrpc.autograd.interface import _get_debug_info as _get_debug_info
    from zrpc.autograd.interface import _get_max_id as _get_max_id
    from zrpc.autograd.interface import _init as _init
    from zrpc.autograd.interface import _is_valid_context as _is_valid_context
    from zrpc.autograd.interface import _new_context as _new_context
    from zrpc.autograd.interface import _release_context as _release_context
    from zrpc.autograd.interface import _retrieve_context as _retrieve_context
    from zrpc.autograd.interface import backward as backward
    from zrpc.autograd.interface import context as context
    from zrpc.autograd.interface import get_gradients as get_gradients
    from zrpc.autograd.interface import is_available as is_available
    from zrpc.autograd.wiring import install as install

_HOMES = {
    "DistAutogradContext": "zrpc.autograd.dist_context",
    "install": "zrpc.autograd.wiring",
    **dict.fromkeys(
        (
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
        ),
        "zrpc.autograd.interface",
    ),
}

__all__ = ["DistAutogradContext", "backward", "context", "get_gradients", "install", "is_available"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zrpc.autograd' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
