"""torch.distributed.rpc.rref_proxy: stand-ins for the values of RRefs."""

from __future__ import annotations

from zrpc.api import rpc_async
from zrpc.config import UNSET_RPC_TIMEOUT_S as UNSET_RPC_TIMEOUT
from zrpc.rref.proxy import RRefProxy, _local_invoke, _local_invoke_async_execution
from zrpc.rref.proxy import _call_method as _invoke_rpc

__all__ = [
    "UNSET_RPC_TIMEOUT",
    "RRefProxy",
    "_invoke_rpc",
    "_local_invoke",
    "_local_invoke_async_execution",
    "rpc_async",
]
