"""torch.distributed.rpc.functions: the mark on functions that return a future."""

from __future__ import annotations

from zrpc.functions import async_execution

__all__ = ["async_execution"]
