"""The ways in which a group of workers can be started: zrpc's three, and TensorPipe."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.meeting import at_broker, at_file, at_tcp

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

RPC_TIMEOUT_S = 300.0
"""Also how long a worker waits for the others: the driver's own time limit comes first."""


@dataclass(frozen=True)
class Mode:
    """One way to start a group.

    Attributes:
        label: what table and plot call it.
        module: where `init_rpc`, `rpc_async` and `shutdown` are.
        options: the class of the options there.
        meeting: makes what the group meets at, and gives its `init_method`.
        late: modules that `init_rpc` imports only when it needs them.
    """

    label: str
    module: str
    options: str
    meeting: Callable[[], AbstractContextManager[str]]
    late: tuple[str, ...] = ()

    def load(self) -> Any:
        """The module, with all that `init_rpc` needs: zrpc imports what is behind a name when it is asked for."""
        rpc = importlib.import_module(self.module)
        assert callable(rpc.init_rpc)
        for module in self.late:
            importlib.import_module(module)
        return rpc

    def init(self, init_method: str, rank: int, world_size: int) -> None:
        """Join the group, in a worker process."""
        rpc = self.load()
        options = getattr(rpc, self.options)(init_method=init_method, rpc_timeout=RPC_TIMEOUT_S)
        rpc.init_rpc(worker_name(rank), rank=rank, world_size=world_size, rpc_backend_options=options)


_BROKERED = ("zrpc.membership.broker", "zrpc.transport.brokered")

MODES = {
    "zrpc-file": Mode("zrpc, file://", "zrpc", "RpcBackendOptions", at_file),
    "zrpc-tcp": Mode("zrpc, tcp://", "zrpc", "RpcBackendOptions", at_tcp),
    "zrpc-broker": Mode("zrpc, broker://", "zrpc", "RpcBackendOptions", at_broker, _BROKERED),
    "tensorpipe": Mode("TensorPipe, tcp://", "torch.distributed.rpc", "TensorPipeRpcBackendOptions", at_tcp),
}


def worker_name(rank: int) -> str:
    """What the worker of that rank is called."""
    return f"worker{rank}"
