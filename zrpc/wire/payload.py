"""A value taken apart for travel: its stream, its tensors and its other large buffers."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from zrpc.wire import placed as placed_codec
from zrpc.wire import received, tensors
from zrpc.wire.envelope import Arriving, Buffer, Envelope, unpack_table
from zrpc.wire.region import SharedBuffers
from zrpc.wire.route import CPU_ONLY, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from zrpc.ids import Incarnation
    from zrpc.wire.messages import Message
    from zrpc.wire.route import Stager


class Passenger(Protocol):
    """Something in a payload that must know whether the payload has left. One that is freed before has not."""

    def has_left(self) -> None:
        """The payload is on its way."""


@dataclass(slots=True, frozen=True)
class Packed:
    """The tensors and buffers of a payload, packed once for several envelopes.

    Attributes:
        table: of the tensors.
        shared: the memory of both.
    """

    table: Sequence[Any]
    shared: SharedBuffers


@dataclass(slots=True)
class Payload:
    """What `pickling.dumps` or `values.pack` make of a value, and what the same value is made of again.

    Attributes:
        data: the pickle stream or packed values.
        tensors: the tensors of the value, in the order in which `data` names them. Call hooks may replace them.
        buffers: memory of PEP 574 objects (numpy arrays among them), in the order in which `data` names them.
        passengers: each `Passenger` or, in a payload that came, what is there for it before it is read; by the bytes
            that stand for it in `data`. None: there are none.
        after: what a call hook has put off until the payload is on its way, or handed over to be sent; never called
            if it cannot be sent.
        is_unseen: whether nobody else on this worker has seen the tensors.
        is_cut_off: something in it requires grad, and its graph does not travel.
        packed: its tensors, packed for several envelopes.
    """

    data: Buffer = b""
    tensors: list[torch.Tensor] = field(default_factory=list)
    buffers: Sequence[Buffer] = ()
    passengers: dict[bytes, Any] | None = None
    after: Callable[[], object] | None = None
    is_unseen: bool = False
    is_cut_off: bool = False
    packed: Packed | None = None

    def let_go(self) -> None:
        """It was read or sealed: keep nothing of its memory, which what was made of it may be the last to see."""
        self.tensors, self.buffers = [], ()

    def has_in_stream(self, key: bytes) -> bool:
        """Whether the stream has `key` in it. A stream in pieces has all that is small in pieces that are `bytes`."""
        return key in self.data or any(key in piece for piece in self.buffers if type(piece) is bytes)

    def has_left(self) -> None:
        """Tell its passengers that it is on its way."""
        for passenger in (self.passengers or {}).values():
            passenger.has_left()


def seal(
    message: Message,
    call_id: int,
    payload: Payload | None,
    extras: dict[str, Any] | None,
    route: Route = CPU_ONLY,
) -> Envelope:
    """The envelope that carries `message` and `payload` along `route`.

    Raises:
        SerializationError: a tensor is of a kind that cannot travel, or on a device that is not mapped.
        DeviceError: a device does not take the work.
    """
    if payload is None:
        return Envelope(message, call_id, extras)
    if payload.packed is not None:
        table, shared = payload.packed.table, payload.packed.shared
        return Envelope(message, call_id, extras, payload.data, table, shared.buffers, shared=shared)
    if not payload.tensors:
        return Envelope(message, call_id, extras, payload.data, (), payload.buffers)
    buffers: list[Buffer | Arriving] = list(payload.buffers)
    if not route.devices:
        table = tensors.pack(payload.tensors, buffers, route)
        return Envelope(message, call_id, extras, payload.data, table, buffers)
    table = placed_codec.pack(payload.tensors, buffers, route)
    is_arriving = any(isinstance(buffer, Arriving) for buffer in buffers)
    return Envelope(message, call_id, extras, payload.data, table, buffers, is_arriving=is_arriving)


def packed_for(payload: Payload, receivers: Sequence[Incarnation]) -> Packed | None:
    """`payload` packed once for all of these, each named once; None where each needs an envelope of its own.

    That is so where it carries passengers, or tensors that are not on the CPU.

    Raises:
        SerializationError: as `seal`.
    """
    if payload.passengers or not all(tensor.is_cpu or tensor.is_meta for tensor in payload.tensors):
        return None
    buffers: list[Buffer | Arriving] = list(payload.buffers)
    table = tensors.pack(payload.tensors, buffers, CPU_ONLY) if payload.tensors else ()
    return Packed(table, SharedBuffers(buffers, receivers))


def open_payload(envelope: Envelope, stager: Stager | None = None) -> Payload:
    """The payload of a received envelope: its tensors are made, its stream is not yet read.

    Args:
        envelope: what came; nothing of it is pending any more.
        stager: brings tensors to devices that arrive there.

    Raises:
        ProtocolError: the tensor table does not fit the buffers, or some of them could not be opened.
        LimitError: some of them could not be opened, because of a limit of the system on this process.
        DeviceError: a tensor that should arrive on a device cannot.
    """
    if envelope.damage is not None:
        raise copy(envelope.damage)  # its traceback refers to the envelope
    buffers: Any = envelope.buffers  # of a received envelope: all of them are here
    if not envelope.table:
        return Payload(envelope.data, [], buffers)
    table = envelope.table if not isinstance(envelope.table, bytes) else unpack_table(envelope.table)
    return Payload(envelope.data, received.unpack(table, buffers, stager), buffers)
