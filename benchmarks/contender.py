"""What a framework must offer to be measured beside the others, and which ones are."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

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
    """One that speaks torch.distributed.rpc: remote references and distributed autograd too."""

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """`torch.add(x, 1)` there."""

    def remote_to_here(self) -> None:
        """Make a remote reference with the function that does nothing, and fetch its value."""

    def autograd_step(self, x: torch.Tensor) -> torch.Tensor:
        """Forward and backward of `torch.add(x, x).sum()`, the addition there; the gradient of `x`."""


@dataclass(frozen=True)
class Entry:
    """A contender in the list.

    Attributes:
        label: what table and plot call it.
        factory: where it is made: `module:function`.
        needs: the package without which it is "not installed".
        distribution: what to `pip install` for it.
        speaks_torch: whether it is a `TorchContender`.
        is_limit: whether it is what the machine allows, and no framework.
    """

    label: str
    factory: str
    needs: str
    distribution: str
    speaks_torch: bool = False
    is_limit: bool = False

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
    "rpyc": Entry("RPyC", "rpyc:Rpyc", "rpyc", "rpyc"),
    "grpc": Entry("gRPC", "grpc:Grpc", "grpc", "grpcio"),
    "ray": Entry("Ray", "ray:Ray", "ray", "ray"),
    "bare-memory": Entry("bare shared memory", "bare:memory", "torch", "torch", is_limit=True),
    "bare-zeromq": Entry("bare ZeroMQ", "bare:zeromq", "zmq", "pyzmq", is_limit=True),
    "bare-tcp": Entry("bare TCP", "bare:tcp", "torch", "torch", is_limit=True),
}
"""Measured in this order, in every round. A new one is an entry here and a module under benchmarks/contenders."""
