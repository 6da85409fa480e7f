"""What a framework must offer to be measured beside the others, and which ones are."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import torch


class Contender(Protocol):
    """One framework: a server process, and the client's end here.

    Each call is one remote call and returns when its result is here. The functions behind them are a method without
    arguments, one that returns its tensor and one that drops it. How a tensor travels is the framework's best ordinary
    way; the module says which.
    """

    def start(self) -> None:
        """Start the server and connect to it. One intra-op thread on either side."""

    def stop(self) -> None:
        """Disconnect, and end the server."""

    def noop(self) -> None:
        """Call the function that does nothing."""

    def noops(self, n: int) -> None:
        """Have `n` calls of it under way at once, and wait for all."""

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        """Send `x` and get it back."""

    def sink(self, x: torch.Tensor) -> None:
        """Send `x`."""


class TorchContender(Contender, Protocol):
    """One that speaks torch.distributed.rpc: remote references and distributed autograd too.

    Attributes:
        rpc: its module with `rpc_sync`, after `init_rpc`.
        autograd: its module with `context` and `backward`.
        callee: the name of the other worker.
    """

    rpc: Any
    autograd: Any
    callee: str


@dataclass(frozen=True)
class Entry:
    """A contender in the list.

    Attributes:
        label: what table and plot call it.
        factory: where it is made: `module:function`.
        needs: the package without which it is "not installed".
        distribution: what to `pip install` for it.
        speaks_torch: whether it is a `TorchContender`.
    """

    label: str
    factory: str
    needs: str
    distribution: str
    speaks_torch: bool = False

    def is_installed(self) -> bool:
        """Whether it can be measured here."""
        return importlib.util.find_spec(self.needs) is not None

    def make(self) -> Contender:
        """A contender, not started."""
        module, _, function = self.factory.partition(":")
        return cast("Contender", getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)())


CONTENDERS = {
    "zrpc": Entry("zrpc", "torch_rpc:zrpc_same_host", "zrpc", "zrpc", speaks_torch=True),
    "tensorpipe": Entry("TensorPipe", "torch_rpc:tensorpipe", "torch", "torch", speaks_torch=True),
    "zrpc-tcp": Entry("zrpc TCP", "torch_rpc:zrpc_tcp", "zrpc", "zrpc", speaks_torch=True),
    "tensorpipe-tcp": Entry("TensorPipe TCP", "torch_rpc:tensorpipe_tcp", "torch", "torch", speaks_torch=True),
    "zrpc-broker": Entry("zrpc broker", "torch_rpc:zrpc_brokered", "zrpc", "zrpc", speaks_torch=True),
    "zrpc-relay": Entry("zrpc relayed", "torch_rpc:zrpc_relayed", "zrpc", "zrpc", speaks_torch=True),
    "rpyc": Entry("RPyC", "rpyc:Rpyc", "rpyc", "rpyc"),
    "grpc": Entry("gRPC", "grpc:Grpc", "grpc", "grpcio"),
    "ray": Entry("Ray", "ray:Ray", "ray", "ray"),
    "bare-memory": Entry("bare shared memory", "bare:memory", "torch", "torch"),
    "bare-zeromq": Entry("bare ZeroMQ", "bare:zeromq", "zmq", "pyzmq"),
    "bare-tcp": Entry("bare TCP", "bare:tcp", "torch", "torch"),
}
"""Measured in this order, in every round. A new one is an entry here and a module under benchmarks/contenders."""
