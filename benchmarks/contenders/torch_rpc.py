"""zrpc and TensorPipe, which have one interface: the same program with another import. Tensors travel as they are."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.contenders.functions import echo, noop, sink
from benchmarks.contenders.server import Server
from benchmarks.meeting import at_broker, at_file, at_tcp

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

HANDLER_THREADS = 16


class TorchRpc:
    """Worker 0 calls worker 1.

    Args:
        rpc: the module with `init_rpc`.
        autograd: the module with `context` and `backward`.
        options: the name of the options' class in `rpc`.
        meeting: gives the group's `init_method`.
        more: further options.
    """

    def __init__(
        self,
        rpc: str,
        autograd: str,
        options: str,
        meeting: Callable[[], AbstractContextManager[str]],
        **more: Any,
    ) -> None:
        self._modules = rpc, autograd
        self._options = options
        self._meeting = meeting
        self._more = more
        self._open = ExitStack()
        self.callee = "worker1"

    def start(self) -> None:
        """See `Contender.start`."""
        init_method = self._open.enter_context(self._meeting())
        self._server = Server(_serve, self._modules[0], self._options, init_method, self._more)
        self._open.callback(self._server.wait)
        self.rpc: Any = _init(0, self._modules[0], self._options, init_method, self._more)
        self._open.callback(self.rpc.shutdown)
        self.autograd: Any = importlib.import_module(self._modules[1])

    def stop(self) -> None:
        """See `Contender.stop`."""
        self._open.close()

    def noop(self) -> None:
        """See `Contender.noop`."""
        self.rpc.rpc_sync(self.callee, noop)

    def noops(self, n: int) -> None:
        """See `Contender.noops`."""
        for future in [self.rpc.rpc_async(self.callee, noop) for _ in range(n)]:
            future.wait()

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        """See `Contender.echo`."""
        answer: torch.Tensor = self.rpc.rpc_sync(self.callee, echo, args=(x,))
        return answer

    def sink(self, x: torch.Tensor) -> None:
        """See `Contender.sink`."""
        self.rpc.rpc_sync(self.callee, sink, args=(x,))


def _init(rank: int, module: str, options: str, init_method: str, more: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    rpc: Any = importlib.import_module(module)
    chosen = getattr(rpc, options)(num_worker_threads=HANDLER_THREADS, init_method=init_method, **more)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=chosen)
    return rpc


def _serve(_: Connection, module: str, options: str, init_method: str, more: dict[str, Any]) -> None:
    _init(1, module, options, init_method, more).shutdown()


def _zrpc(meeting: Callable[[], AbstractContextManager[str]], **more: Any) -> TorchRpc:
    return TorchRpc("zrpc", "zrpc.autograd", "RpcBackendOptions", meeting, **more)


def _tensorpipe(**more: Any) -> TorchRpc:
    module = "torch.distributed"
    return TorchRpc(f"{module}.rpc", f"{module}.autograd", "TensorPipeRpcBackendOptions", at_tcp, **more)


def zrpc_same_host() -> TorchRpc:
    """Without a broker; large tensors through shared memory."""
    return _zrpc(at_file)


def zrpc_tcp() -> TorchRpc:
    """Without a broker; everything through TCP."""
    return _zrpc(at_file, shared_memory=False)


def zrpc_brokered() -> TorchRpc:
    """Through a broker; large tensors through shared memory."""
    return _zrpc(at_broker)


def zrpc_relayed() -> TorchRpc:
    """Through a broker, everything: as between hosts that reach nothing but the broker."""
    return _zrpc(at_broker, shared_memory=False)


def tensorpipe() -> TorchRpc:
    """torch's own choice of transports and channels: shared memory and process_vm_readv on one host."""
    return _tensorpipe()


def tensorpipe_tcp() -> TorchRpc:
    """Everything through TCP."""
    return _tensorpipe(_transports=["uv"], _channels=["basic"])
