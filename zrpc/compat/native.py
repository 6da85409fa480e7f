"""The names of torch's C++ modules for RPC and distributed autograd, with zrpc's things behind them."""

from __future__ import annotations

from typing import Any

from zrpc.compat import autograd, invocation, rpc

RPC_AVAILABLE = True
"""What DistributedDataParallel remembers of the RPC that torch was built with; it then looks for tensors in RRefs."""

_RPC_NAMES = (
    "PyRRef",
    "RemoteProfilerManager",
    "RpcAgent",
    "RpcBackendOptions",
    "TensorPipeAgent",
    "WorkerInfo",
    "_DEFAULT_INIT_METHOD",
    "_DEFAULT_NUM_WORKER_THREADS",
    "_DEFAULT_RPC_TIMEOUT_SEC",
    "_TensorPipeRpcBackendOptionsBase",
    "_UNSET_RPC_TIMEOUT",
    "_cleanup_python_rpc_handler",
    "_delete_all_user_and_unforked_owner_rrefs",
    "_destroy_rref_context",
    "_get_current_rpc_agent",
    "_is_current_rpc_agent_set",
    "_reset_current_rpc_agent",
    "_rref_context_get_debug_info",
    "_set_and_start_rpc_agent",
    "_set_profiler_node_id",
    "_set_rpc_timeout",
    "enable_gil_profiling",
    "get_rpc_timeout",
)


_AUTOGRAD_NAMES = tuple(name for name in autograd.__all__ if name not in ("context", "is_available"))

_INVOKING = {f"_{name}": function for name, function in vars(invocation).items() if name.startswith("invoke_")}

NAMES: dict[str, dict[str, Any]] = {
    "_distributed_rpc": {**{name: getattr(rpc, name) for name in _RPC_NAMES}, **_INVOKING},
    "_distributed_autograd": {name: getattr(autograd, name) for name in _AUTOGRAD_NAMES},
}
"""Module of torch._C -> what it is to hold."""
