"""Optimizers whose parameters live on many workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zrpc.optim.distributed_optimizer import DistributedOptimizer as DistributedOptimizer

__all__ = ["DistributedOptimizer"]


def __getattr__(name: str) -> Any:
    if name != "DistributedOptimizer":
        raise AttributeError(f"module 'zrpc.optim' has no attribute {name!r}")
    from zrpc.optim.distributed_optimizer import DistributedOptimizer

    return DistributedOptimizer
