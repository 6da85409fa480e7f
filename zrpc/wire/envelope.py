"""What travels: an envelope, as a list of frames.

Frame 0 is a msgpack array `[version, code, call_id, fields, extras, table, buffers, data]`, and of a call of users also
`time_left_ms`; the frames behind it are the large buffers, one each, in order. `buffers` has an entry a buffer: its
bytes, if it is small enough to ride inside frame 0; its length in bytes, if it is a frame of its own; or a descriptor
(a list) of memory that both sides share, if the transport has put it there. A small message is therefore one frame: one
send, one receive, no wait for a second part. Where a message has many buffers, those that are not large share one frame
or one piece of shared memory (`zrpc.wire.region`).

The broker uses this module, so it knows nothing of torch.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgpack

from zrpc import remote_text
from zrpc.errors import LimitError, ProtocolError, ZrpcError
from zrpc.wire import packed_bytes
from zrpc.wire.messages import FIELD_GETTERS, PROTOCOL_VERSION, Message, make_message
from zrpc.wire.region import MEMBER_LENGTH, TINY_MAX_NBYTES, Region, SharedBuffers, cut, gather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Buffer = bytes | bytearray | memoryview
"""Anything with the buffer interface that frames are made of and buffers arrive as."""

PACKED_MIN_ENTRIES = 256
"""Tables from this length on travel packed, as bytes. Whoever opens the message reads them: the thread that takes it in
is spared that."""

INLINE_MAX_NBYTES = TINY_MAX_NBYTES
"""Buffers up to this size ride inside frame 0: a copy of 4 KiB costs less than a frame of its own."""


MAX_TIME_LEFT_MS = 10**12
"""As long as the longest time limit (`zrpc.config.MAX_TIMEOUT_S`)."""


class Arriving:
    """A buffer whose bytes are still on their way into the memory of this process, from a device for example.

    It is read once, by the thread that sends it.

    Attributes:
        nbytes: its length.
    """

    nbytes: int

    def __len__(self) -> int:
        return self.nbytes

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes in order, each piece as soon as it is there; a piece stays as it is while anybody sees it.

        Raises:
            DeviceError: the rest will not come.
        """
        raise NotImplementedError

    def whole(self) -> Buffer:
        """All of it, once it is there."""
        pieces = list(self.pieces())
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class HandedBack:
    """A buffer that fills memory of the receiver's, which this worker gives back to it with the message.

    Attributes:
        descriptor: what travels: where that memory is.
        nbytes: how many bytes of it are filled.
    """

    __slots__ = ("descriptor", "nbytes")

    def __init__(self, descriptor: list[Any], nbytes: int) -> None:
        self.descriptor = descriptor
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes


class Pending(Protocol):
    """Buffers of a received envelope that its sender is still writing, into memory that is shared."""

    def wait(self, deadline: float | None) -> bool:
        """Wait until all of them are written; false if `deadline` (`time.monotonic`) has passed before.

        Raises:
            PeerLostError: the sender is lost, and they never will be.
            ProtocolError: the sender gave up.
            AgentClosedError: this worker shuts down.
        """


_packers: list[msgpack.Packer] = []
"""Packers that nobody uses now. Taking one out and putting it back are atomic. One packer must not be shared: packing
allocates, so garbage collection may run in its midst, and with it other threads that send."""
PACKER_MAX_NBYTES = 1 << 20
"""A packer that has made more than this is not used again."""
_HEADER_LENGTH = 8
_CALL_HEADER_LENGTH = 9
_HEADER_TYPES = {(int, table, list, bytes, extras) for table in (list, bytes) for extras in (type(None), dict)}
"""Of call id, table, buffers, data and extras."""


@dataclass(slots=True)
class Envelope:
    """One message with what rides beside it.

    Attributes:
        message: the typed part.
        call_id: the number that the sender of a request gave it; its answer carries the same.
        extras: what the hooks of a call add (autograd, profiling), by hook key; msgpack values.
        data: the pickle stream or packed values; empty if there are none.
        table: an entry a tensor of `data` (`zrpc.wire.tensors` says what). A long one arrives as bytes.
        buffers: the memory of the tensors and PEP 574 buffers, in the order that `table` and `data` name them.
        damage: why not all of `buffers` is there: memory that both sides should share cannot be opened here.
        is_arriving: some of `buffers` is `Arriving`: to send it takes a while.
        is_last_use: its sender needs nothing of `buffers` any more.
        pending: some of `buffers` may not be read before `pending.wait`.
        shared: other envelopes have the same `buffers`.
        time_left_ms: of a call of users: what is left of its time limit, 0: it has none. None: any other message.
    """

    message: Message
    call_id: int = 0
    extras: dict[str, Any] | None = None
    data: Buffer = b""
    table: Sequence[Any] | bytes = ()
    buffers: Sequence[Buffer | Arriving | HandedBack] = field(default_factory=list)
    damage: ZrpcError | None = None
    is_arriving: bool = False
    is_last_use: bool = False
    pending: Pending | None = None
    shared: SharedBuffers | None = None
    time_left_ms: int | None = None


def nbytes_of(buffers: Sequence[Buffer | Arriving | HandedBack]) -> int:
    """What `buffers` take together, in bytes."""
    nbytes = 0
    for buffer in buffers:  # a generator takes twice as long for one or two
        nbytes += buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
    return nbytes


def encode(
    envelope: Envelope, place: Callable[[Buffer | Arriving | Region], list[Any] | None] | None = None
) -> list[Buffer]:
    """The frames of `envelope`. Large buffers are not copied: they must stay unchanged until the frames are sent.

    Args:
        envelope: what to send.
        place: puts a large buffer, or a region, where the receiver can see it and gives its descriptor, or None to have
            it sent.

    Raises:
        ProtocolError: a field or an extra is not something that msgpack can carry.
        DeviceError: what is still on its way from a device will not come.
    """
    message = envelope.message
    inline: list[Any] = []
    frames: list[Buffer] = [b""]
    buffers: Sequence[Buffer | Arriving | HandedBack | Region] = envelope.buffers
    entries: dict[int, list[int] | None] = {}
    gathered = None
    if len(buffers) > 1:
        gathered = gather(buffers) if envelope.shared is None else envelope.shared.gathered
    if gathered is not None:
        entries = gathered.entries
        buffers = [*buffers, *gathered.regions]
    for index, buffer in enumerate(buffers):
        if index in entries:
            inline.append(entries[index])
            continue
        if isinstance(buffer, HandedBack):
            inline.append(buffer.descriptor)
            continue
        nbytes = buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
        if nbytes <= INLINE_MAX_NBYTES and not isinstance(buffer, Region):
            if isinstance(buffer, Arriving):
                buffer = buffer.whole()
            inline.append(buffer if type(buffer) is bytes else bytes(buffer))
            continue
        descriptor = place(buffer) if place is not None else None
        if descriptor is not None:
            inline.append(descriptor)
        else:
            inline.append(nbytes)
            frames.append(_as_frame(buffer))
    if gathered is not None and gathered.sizes is not None:
        inline.append(gathered.sizes)
    try:
        header = (
            PROTOCOL_VERSION,
            message.CODE,
            envelope.call_id,
            FIELD_GETTERS[type(message)](message),
            envelope.extras,
            envelope.table if len(envelope.table) < PACKED_MIN_ENTRIES else _pack(envelope.table),
            inline,
            envelope.data,
        )
        time_left_ms = envelope.time_left_ms
        frames[0] = _pack(header if time_left_ms is None else (*header, time_left_ms))
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{message!r} cannot be packed: {error}") from error
    return frames


def _as_frame(buffer: Buffer | Arriving | Region) -> Buffer:
    if isinstance(buffer, Arriving):
        return buffer.whole()
    return buffer.joined() if isinstance(buffer, Region) else buffer


def _pack(header: Sequence[Any]) -> bytes:
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer()
    packed: bytes = packer.pack(header)
    if len(packed) <= PACKER_MAX_NBYTES:  # a packer keeps the largest buffer that it ever had
        _packers.append(packer)
    return packed


def decode(frames: Sequence[Buffer], fetch: Callable[[list[Any]], Buffer] | None = None) -> Envelope:
    """The envelope that `frames` carry. Its large buffers are views of the frames, or of shared memory.

    Args:
        frames: what came.
        fetch: finds the memory that a descriptor tells of. Where it raises a `ProtocolError` or
            `LimitError`, the envelope is damaged.

    Raises:
        ProtocolError: the frames are not an envelope of this version, with what is wrong with them.
    """
    try:
        header = packed_bytes.unpack(frames[0])
    except Exception as error:
        text = remote_text.line(str(error))
        raise ProtocolError(
            f"a message of {len(frames)} frames does not begin with a msgpack header: {text}"
        ) from error
    if not isinstance(header, list) or not header or header[0] != PROTOCOL_VERSION:
        version = header[0] if isinstance(header, list) and header else header
        raise ProtocolError(
            f"the peer speaks version {reprlib.repr(version)} of the protocol and this worker version "
            f"{PROTOCOL_VERSION}: install the same zrpc on both"
        )
    time_left_ms = None
    if len(header) == _CALL_HEADER_LENGTH:
        time_left_ms = header.pop()
        if type(time_left_ms) is not int or not 0 <= time_left_ms <= MAX_TIME_LEFT_MS:
            raise ProtocolError(f"a call has {reprlib.repr(time_left_ms)} milliseconds left")
    if len(header) != _HEADER_LENGTH:
        raise ProtocolError(f"a header has {len(header)} fields instead of {_HEADER_LENGTH}")
    _, code, call_id, fields, extras, table, buffers, data = header
    if (type(call_id), type(table), type(buffers), type(data), type(extras)) not in _HEADER_TYPES:
        raise ProtocolError(f"a header {reprlib.repr(header)} has a part of a wrong type")
    message = make_message(code, fields)
    try:
        damage = _fill_in(buffers, frames, fetch) if buffers or len(frames) > 1 else None
    except ZrpcError:
        raise
    except Exception as error:
        raise ProtocolError(f"the buffers of a message do not fit: {remote_text.line(str(error))}") from error
    return Envelope(message, call_id, extras, data, table, buffers, damage, time_left_ms=time_left_ms)


def unpack_table(packed: bytes) -> list[Any]:
    """A table that arrived as bytes. To read it takes a while: not for the thread that reads messages.

    Raises:
        ProtocolError: it is damaged.
    """
    try:
        table = packed_bytes.unpack(packed)
    except Exception as error:
        raise ProtocolError(f"a table of tensors cannot be read: {remote_text.line(str(error))}") from error
    if not isinstance(table, list):
        raise ProtocolError(f"a table of tensors is {reprlib.repr(table)}")
    return table


def _fill_in(
    buffers: list[Any], frames: Sequence[Buffer], fetch: Callable[[list[Any]], Buffer] | None
) -> ZrpcError | None:
    """Put frames where `buffers` holds their lengths, and shared memory where it holds descriptors.

    Returns:
        What went wrong with shared memory, if anything did.
    """
    damage = None
    members: list[int] = []
    packed: list[int] = []
    following = iter(frames[1:])
    for index, entry in enumerate(buffers):
        if type(entry) is bytes:
            continue
        if entry is None:
            packed.append(index)
            continue
        if isinstance(entry, list):
            if len(entry) == MEMBER_LENGTH:
                members.append(index)
                continue
            if fetch is None:
                raise ProtocolError(f"buffer {index} lies in shared memory, which this worker does not use")
            try:
                buffers[index] = fetch(entry)
            except (ProtocolError, LimitError) as error:
                damage = error.with_traceback(None)  # which refers to this function, and so to the other buffers
            continue
        frame = next(following, None)
        if frame is None or len(frame) != entry:
            got = "no frame" if frame is None else f"{len(frame)} bytes"
            raise ProtocolError(f"buffer {index} should have {reprlib.repr(entry)} bytes, and {got} came")
        buffers[index] = frame
    if next(following, None) is not None:
        surplus = 1 + sum(1 for _ in following)
        raise ProtocolError(f"a message has {surplus} frames more than its header names")
    if members or packed:
        cut(buffers, members, packed, damage is None)
    return damage
