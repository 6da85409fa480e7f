"""Remote calls, remote references and distributed autograd for PyTorch, on ZeroMQ.

`import zrpc as rpc` gives the names of torch.distributed.rpc. They are looked up when they are first used, so this
import is cheap and brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zrpc import functions as functions
    from zrpc.agent.future import Future as Future
    from zrpc.agent.retry import RetryPolicy as RetryPolicy
    from zrpc.agent.served import is_cancelled as is_cancelled
    from zrpc.agent.served import time_remaining as time_remaining
    from zrpc.api import broadcast as broadcast
    from zrpc.api import get_worker_info as get_worker_info
    from zrpc.api import remote as remote
    from zrpc.api import rpc_async as rpc_async
    from zrpc.api import rpc_sync as rpc_sync
    from zrpc.config import RpcBackendOptions as RpcBackendOptions
    from zrpc.draining import drain as drain
    from zrpc.errors import ZrpcError as ZrpcError
    from zrpc.exposed import expose as expose
    from zrpc.ids import WorkerInfo as WorkerInfo
    from zrpc.lifecycle import init_rpc as init_rpc
    from zrpc.lifecycle import shutdown as shutdown
    from zrpc.rref.rref import RRef as RRef
    from zrpc.session import session as session

_HOMES = {
    "Future": "zrpc.agent.collection",  # which lets torch.futures see failures of its futures
    "RRef": "zrpc.rref.rref",
    "RetryPolicy": "zrpc.agent.retry",
    "RpcBackendOptions": "zrpc.config",
    "WorkerInfo": "zrpc.ids",
    "ZrpcError": "zrpc.errors",
    "broadcast": "zrpc.api",
    "drain": "zrpc.draining",
    "expose": "zrpc.exposed",
    "get_worker_info": "zrpc.api",
    "init_rpc": "zrpc.lifecycle",
    "is_cancelled": "zrpc.agent.served",
    "remote": "zrpc.api",
    "rpc_async": "zrpc.api",
    "rpc_sync": "zrpc.api",
    "session": "zrpc.session",
    "shutdown": "zrpc.lifecycle",
    "time_remaining": "zrpc.agent.served",
}
_MODULES = ("autograd", "errors", "functions", "nn", "optim")

__all__ = [
    "Future",
    "RRef",
    "RetryPolicy",
    "RpcBackendOptions",
    "WorkerInfo",
    "ZrpcError",
    "broadcast",
    "drain",
    "expose",
    "functions",
    "get_worker_info",
    "init_rpc",
    "is_available",
    "is_cancelled",
    "remote",
    "rpc_async",
    "rpc_sync",
    "session",
    "shutdown",
    "time_remaining",
]


def is_available() -> bool:
    """Whether remote calls can be made here: always."""
    return True


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("zrpc")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return import_module(f"zrpc.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zrpc' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
