"""The way of tensors to one peer: on which devices they arrive, and who brings them to and from devices.

This package knows of devices only what `Stager` says; `zrpc.staging` is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from zrpc.errors import SerializationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from zrpc.wire.envelope import Arriving, Buffer


class Stager(Protocol):
    """Brings bytes between the memory of devices and that of the host."""

    def fetch(self, source: torch.Tensor, device: str) -> Arriving:
        """Begin to bring `source` to the host, after all that the current stream of `device` has been given so far.

        Args:
            source: uint8, contiguous, on `device`. Not to be written to until the message that it is for was answered.
            device: where it is.

        Raises:
            DeviceError: the device does not take the work.
        """

    def deliver(self, buffer: Buffer, device: str) -> torch.Tensor:
        """Begin to bring `buffer` to `device`; what the current stream there is given from now on runs after that.

        Returns:
            uint8, of the length of `buffer`, on `device`; its memory is nobody else's.

        Raises:
            DeviceError: there is no such device, or it has no room.
        """


@dataclass(frozen=True, slots=True)
class Route:
    """How tensors travel to one peer in one kind of message.

    Attributes:
        devices: device here -> device there, as `str(torch.device)`; empty: only tensors on the CPU travel.
        stager: needed where a device of `devices` is not the CPU.
        kind: "Request" or "Response", for errors.
        destination: the peer's name, for errors.
    """

    devices: Mapping[str, str] = field(default_factory=dict)
    stager: Stager | None = None
    kind: str = "Request"
    destination: str = "this peer"

    def unmapped(self, device: str) -> SerializationError:
        """The error that says that tensors on `device` cannot go this way, in words that torch's users look for."""
        return SerializationError(
            f"a tensor on {device} cannot be sent, for zrpc as the TensorPipe RPC backend only supports CPU tensors by "
            "default: send tensor.cpu(), or call `set_device_map` on `TensorPipeRpcBackendOptions` (or any "
            "RpcBackendOptions) of the worker that calls, before init_rpc. "
            f"{self.kind} device mapping is not available for destination {self.destination}, device {device}"
        )


CPU_ONLY = Route()
"""The way to a peer for which there is no device map."""
