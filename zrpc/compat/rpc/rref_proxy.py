"""torch.distributed.rpc.rref_proxy: stand-ins for the values of RRefs."""

from __future__ import annotations

from zrpc.rref.proxy import RRefProxy

__all__ = ["RRefProxy"]
