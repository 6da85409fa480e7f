"""A value taken apart for travel: its stream, its tensors and its other large buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from zrpc.wire import tensors as tensor_codec
from zrpc.wire.envelope import Buffer, Envelope

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from zrpc.wire.messages import Message


class Passenger(Protocol):
    """Something in a payload that must know whether the payload has left. One that is freed before has not."""

    def has_left(self) -> None:
        """The payload is on its way."""


@dataclass(slots=True)
class Payload:
    """What `pickling.dumps` or `values.pack` make of a value, and what the same value is made of again.

    Attributes:
        data: the pickle stream or packed values.
        tensors: the tensors of the value, in the order in which `data` names them. Call hooks may replace them.
        buffers: memory of PEP 574 objects (numpy arrays among them), in the order in which `data` names them.
        passengers: each `Passenger` or, in a payload that came, what is there for it before it is read; by the bytes
            that stand for it in `data`. None: there are none.
    """

    data: Buffer = b""
    tensors: list[torch.Tensor] = field(default_factory=list)
    buffers: Sequence[Buffer] = ()
    passengers: dict[bytes, Any] | None = None

    def has_left(self) -> None:
        """Tell its passengers that it is on its way."""
        for passenger in (self.passengers or {}).values():
            passenger.has_left()


def seal(
    message: Message,
    call_id: int,
    payload: Payload | None,
    extras: dict[str, Any] | None,
    device_map: tensor_codec.DeviceNames,
) -> Envelope:
    """The envelope that carries `message` and `payload`.

    `device_map` says on which device there a tensor of each device here arrives.

    Raises:
        SerializationError: a tensor is of a kind that cannot travel, or on a device that is not mapped.
    """
    if payload is None:
        return Envelope(message, call_id, extras)
    if not payload.tensors:
        return Envelope(message, call_id, extras, payload.data, (), payload.buffers)
    buffers: list[Buffer] = list(payload.buffers)
    table = tensor_codec.pack(payload.tensors, buffers, device_map)
    return Envelope(message, call_id, extras, payload.data, table, buffers)


def open_payload(envelope: Envelope) -> Payload:
    """The payload of a received envelope: its tensors are made, its stream is not yet read.

    Raises:
        ProtocolError: the tensor table does not fit the buffers, or some of them could not be opened.
    """
    if envelope.damage is not None:
        raise envelope.damage
    if not envelope.table:
        return Payload(envelope.data, [], envelope.buffers)
    made = tensor_codec.unpack(envelope.table, envelope.buffers)
    return Payload(envelope.data, made, envelope.buffers)
