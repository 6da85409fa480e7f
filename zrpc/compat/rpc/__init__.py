"""torch.distributed.rpc: what programs import by that name, made of zrpc."""

from __future__ import annotations

import logging
from typing import Any

from torch._C._distributed_c10d import Store as Store

from zrpc.compat import agent
from zrpc.compat import autograd as dist_autograd
from zrpc.compat.agent import RpcAgent as RpcAgent
from zrpc.compat.agent import TensorPipeAgent as TensorPipeAgent
from zrpc.compat.agent import enable_gil_profiling as enable_gil_profiling
from zrpc.compat.missing import explaining
from zrpc.compat.rpc import _utils as _utils
from zrpc.compat.rpc import api as api
from zrpc.compat.rpc import backend_registry as backend_registry
from zrpc.compat.rpc import constants as constants
from zrpc.compat.rpc import functions as functions
from zrpc.compat.rpc import internal as internal
from zrpc.compat.rpc import options as options
from zrpc.compat.rpc import rref_proxy as rref_proxy
from zrpc.compat.rpc import server_process_global_profiler as server_process_global_profiler
from zrpc.compat.rpc.api import AllGatherStates as AllGatherStates
from zrpc.compat.rpc.api import RemoteProfilerManager as RemoteProfilerManager
from zrpc.compat.rpc.api import _all_gather as _all_gather
from zrpc.compat.rpc.api import _barrier as _barrier
from zrpc.compat.rpc.api import _cleanup_python_rpc_handler as _cleanup_python_rpc_handler
from zrpc.compat.rpc.api import _delete_all_user_and_unforked_owner_rrefs as _delete_all_user_and_unforked_owner_rrefs
from zrpc.compat.rpc.api import _destroy_rref_context as _destroy_rref_context
from zrpc.compat.rpc.api import _get_current_rpc_agent as _get_current_rpc_agent
from zrpc.compat.rpc.api import _invoke_remote_builtin as _invoke_remote_builtin
from zrpc.compat.rpc.api import _invoke_remote_python_udf as _invoke_remote_python_udf
from zrpc.compat.rpc.api import _invoke_remote_torchscript as _invoke_remote_torchscript
from zrpc.compat.rpc.api import _invoke_rpc_builtin as _invoke_rpc_builtin
from zrpc.compat.rpc.api import _invoke_rpc_python_udf as _invoke_rpc_python_udf
from zrpc.compat.rpc.api import _invoke_rpc_torchscript as _invoke_rpc_torchscript
from zrpc.compat.rpc.api import _is_current_rpc_agent_set as _is_current_rpc_agent_set
from zrpc.compat.rpc.api import _rref_context_get_debug_info as _rref_context_get_debug_info
from zrpc.compat.rpc.api import _set_and_start_rpc_agent as _set_and_start_rpc_agent
from zrpc.compat.rpc.api import _set_rpc_timeout as _set_rpc_timeout
from zrpc.compat.rpc.api import _wait_all as _wait_all
from zrpc.compat.rpc.api import _wait_all_workers as _wait_all_workers
from zrpc.compat.rpc.api import get_rpc_timeout as get_rpc_timeout
from zrpc.compat.rpc.api import get_worker_info, method_factory, new_method, remote, rpc_async, rpc_sync, shutdown
from zrpc.compat.rpc.backend_registry import (
    BackendType,
    BackendValue,
    backend_registered,
    construct_rpc_backend_options,
    init_backend,
    register_backend,
)
from zrpc.compat.rpc.initialization import _init_rpc_backend as _init_rpc_backend
from zrpc.compat.rpc.initialization import _validate_rpc_args as _validate_rpc_args
from zrpc.compat.rpc.initialization import init_rpc
from zrpc.compat.rpc.options import RpcBackendOptions as RpcBackendOptions
from zrpc.compat.rpc.options import TensorPipeRpcBackendOptions
from zrpc.compat.rpc.server_process_global_profiler import (
    _server_process_global_profile as _server_process_global_profile,
)
from zrpc.compat.rpc.stand_ins import _set_profiler_node_id as _set_profiler_node_id
from zrpc.ids import WorkerInfo as WorkerInfo
from zrpc.rref.rref import RRef

PyRRef = RRef
_TensorPipeRpcBackendOptionsBase = TensorPipeRpcBackendOptions
_is_tensorpipe_available = True
_reset_current_rpc_agent = agent.reset_current_rpc_agent
_DEFAULT_INIT_METHOD = constants.DEFAULT_INIT_METHOD
_DEFAULT_NUM_WORKER_THREADS = constants.DEFAULT_NUM_WORKER_THREADS
_DEFAULT_RPC_TIMEOUT_SEC = constants.DEFAULT_RPC_TIMEOUT_SEC
_UNSET_RPC_TIMEOUT = constants.UNSET_RPC_TIMEOUT

logger = logging.getLogger(__name__)
__getattr__ = explaining("torch.distributed.rpc")

__all__ = [
    "AllGatherStates",
    "BackendType",
    "BackendValue",
    "RRef",
    "TensorPipeRpcBackendOptions",
    "backend_registered",
    "construct_rpc_backend_options",
    "get_worker_info",
    "init_backend",
    "init_rpc",
    "is_available",
    "method_factory",
    "new_method",
    "register_backend",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]


def is_available() -> bool:
    """Whether there is RPC: always."""
    return True


@api._require_initialized
def _get_debug_info() -> dict[str, Any]:
    """The counts of references, agent and distributed autograd together."""
    return {
        **_rref_context_get_debug_info(),
        **api._get_current_rpc_agent().get_debug_info(),
        **dist_autograd._get_debug_info(),
    }
