"""torch.distributed.optim.optimizer: the distributed optimizer."""

from __future__ import annotations

from zrpc.optim import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
