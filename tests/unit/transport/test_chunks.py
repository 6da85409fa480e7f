"""Large buffers in chunks: what goes out comes together again, and what does not fit is refused."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zrpc.errors import DeviceError, OverloadedError, ProtocolError
from zrpc.transport import chunks
from zrpc.transport.chunks import CHUNK_NBYTES, ENCRYPTED_MIN_NBYTES, MIN_NBYTES, Transfers, WarmBuffers
from zrpc.wire.envelope import Arriving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

A, B = b"A" * 8, b"B" * 8


class Wire:
    """What was sent, to be received by whoever wants to."""

    def __init__(self) -> None:
        self.messages: list[tuple[Incarnation, list[bytes]]] = []

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        self.messages.append((to, [bytes(frame) for frame in frames]))


def pattern(nbytes: int) -> memoryview:
    return np.arange(nbytes, dtype=np.uint32).astype(np.uint8).data


@pytest.mark.parametrize("nbytes", [MIN_NBYTES, MIN_NBYTES + 1, MIN_NBYTES + CHUNK_NBYTES + 77])
def test_a_large_buffer_comes_together_again(nbytes: int) -> None:
    wire = Wire()
    sender, receiver = Transfers(wire.send), Transfers(wire.send)
    buffer = pattern(nbytes)
    descriptor = sender.place(B, buffer)
    assert descriptor is not None
    assert all(to == B and receiver.is_chunk(frames) for to, frames in wire.messages)
    for _, frames in wire.messages:
        receiver.receive(A, frames)
    received = receiver.fetch(A, descriptor)
    assert received == buffer
    assert not received.readonly


def test_smaller_buffers_are_left_to_travel_as_one_frame() -> None:
    wire = Wire()
    assert Transfers(wire.send).place(B, bytes(MIN_NBYTES - 1)) is None
    encrypted = Transfers(wire.send, is_encrypted=True)
    assert encrypted.place(B, bytes(ENCRYPTED_MIN_NBYTES - 1)) is None
    assert not wire.messages
    assert encrypted.place(B, bytes(ENCRYPTED_MIN_NBYTES)) is not None


class InPieces(Arriving):
    """A buffer that comes in three pieces, after each of which `on_piece` is called."""

    def __init__(self, on_piece: Callable[[], None], error: Exception | None = None) -> None:
        self.parts = [bytes([number]) * CHUNK_NBYTES for number in range(3)]
        self.nbytes = sum(map(len, self.parts))
        self._on_piece = on_piece
        self._error = error

    def pieces(self) -> Iterator[memoryview]:
        for part in self.parts:
            yield memoryview(part)
            self._on_piece()
        if self._error is not None:
            raise self._error


def test_pieces_of_a_buffer_that_arrives_leave_one_by_one() -> None:
    wire, sent = Wire(), []
    sender, receiver = Transfers(wire.send), Transfers(wire.send)
    buffer = InPieces(lambda: sent.append(len(wire.messages)))
    descriptor = sender.place(B, buffer)
    assert sent == [1, 2, 3]
    assert descriptor is not None
    for _, frames in wire.messages:
        receiver.receive(A, frames)
    assert receiver.fetch(A, descriptor) == b"".join(buffer.parts)


def test_a_buffer_that_does_not_arrive_is_taken_back() -> None:
    wire = Wire()
    sender, receiver = Transfers(wire.send), Transfers(wire.send)
    with pytest.raises(DeviceError, match="it failed"):
        sender.place(B, InPieces(lambda: None, DeviceError("it failed")))
    for _, frames in wire.messages:
        receiver.receive(A, frames)
    assert not receiver._incoming


def test_transfers_of_several_senders_may_mix() -> None:
    wires = {A: Wire(), B: Wire()}
    receiver = Transfers(Wire().send)
    descriptors, buffers = {}, {}
    for number, (source, wire) in enumerate(wires.items()):
        buffers[source] = bytes([number + 1]) * MIN_NBYTES
        descriptors[source] = Transfers(wire.send).place(B, buffers[source])
    assert descriptors[A] == descriptors[B], "each sender counts for itself"
    for messages in zip(*(wire.messages for wire in wires.values()), strict=True):
        for source, (_, frames) in zip(wires, messages, strict=True):
            receiver.receive(source, frames)
    for source, descriptor in descriptors.items():
        assert descriptor is not None
        assert receiver.fetch(source, descriptor) == buffers[source]


def _chunk(number: int, offset: int, nbytes: int, raw: bytes) -> list[bytes]:
    return [chunks._HEADER.pack(chunks.MAGIC, number, offset, nbytes), raw]


@pytest.mark.parametrize(
    "frames", [[b"\xc1", b"x"], _chunk(1, 5, 8, bytes(8)), _chunk(1, 1 << 60, 8, b"x"), _chunk(1, 0, 0, b"x")]
)
def test_chunks_that_do_not_fit_are_refused(frames: list[bytes]) -> None:
    receiver = Transfers(Wire().send)
    assert receiver.is_chunk(frames)
    with pytest.raises(ProtocolError):
        receiver.receive(A, frames)


@pytest.mark.parametrize("frames", [[b"\x98"], [b"\x98", b"x"], [b""], [b"", b"x"], [b"\xc1"], [b"\xc1", b"", b""]])
def test_other_messages_are_no_chunks(frames: list[bytes]) -> None:
    assert not Transfers(Wire().send).is_chunk(frames)


@pytest.mark.parametrize("descriptor", [[1, 8], [2, 9], [2, 8, 9], ["2", 8], [[2], 8], []])
def test_descriptors_of_nothing_are_refused(descriptor: list[Any]) -> None:
    receiver = Transfers(Wire().send)
    receiver.receive(A, _chunk(2, 0, 8, bytes(8)))
    with pytest.raises(ProtocolError, match=r"has not come|describes no transfer"):
        receiver.fetch(A, descriptor)
    with pytest.raises(ProtocolError, match="has not come"):
        receiver.fetch(B, [2, 8])


def test_a_transfer_with_a_chunk_missing_is_refused() -> None:
    wire = Wire()
    sender, receiver = Transfers(wire.send), Transfers(wire.send)
    descriptor = sender.place(B, pattern(MIN_NBYTES))
    assert descriptor is not None
    del wire.messages[3]
    for _, frames in wire.messages:
        receiver.receive(A, frames)
    with pytest.raises(ProtocolError, match=f"{CHUNK_NBYTES} of the {MIN_NBYTES} bytes of transfer 1 were lost"):
        receiver.fetch(A, descriptor)
    assert not receiver._incoming


def test_what_no_envelope_will_name_is_taken_back() -> None:
    wire = Wire()
    sender, receiver = Transfers(wire.send), Transfers(wire.send)
    descriptor = sender.place(B, pattern(MIN_NBYTES))
    assert descriptor is not None
    sender.take_back(B, descriptor)
    for _, frames in wire.messages:
        receiver.receive(A, frames)
    assert not receiver._incoming


def test_a_transfer_that_cannot_be_sent_to_its_end_is_taken_back() -> None:
    class NarrowWire(Wire):
        def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
            if len(self.messages) == 3:
                self.messages.append((to, []))
                raise OverloadedError("full")
            super().send(to, frames)

    wire = NarrowWire()
    receiver = Transfers(Wire().send)
    with pytest.raises(OverloadedError):
        Transfers(wire.send).place(B, pattern(MIN_NBYTES))
    for _, frames in wire.messages:
        if frames:
            receiver.receive(A, frames)
    assert len(wire.messages) == 5
    assert not receiver._incoming


def test_chunks_of_one_transfer_agree_on_its_size() -> None:
    receiver = Transfers(Wire().send)
    receiver.receive(A, _chunk(1, 0, 8, bytes(4)))
    with pytest.raises(ProtocolError, match="says 9 bytes, another 8"):
        receiver.receive(A, _chunk(1, 4, 9, bytes(4)))


def test_what_a_lost_sender_began_is_dropped() -> None:
    receiver = Transfers(Wire().send)
    for source in (A, B):
        receiver.receive(source, _chunk(2, 0, 8, source))
    receiver.forget(A)
    with pytest.raises(ProtocolError):
        receiver.fetch(A, [2, 8])
    assert receiver.fetch(B, [2, 8]) == B


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    buffers = WarmBuffers()
    first = buffers.lend(1000)
    address = first.ctypes.data
    view = first[10:20].data
    del first
    other = buffers.lend(1000)
    assert other.ctypes.data != address, "a view of it lives"
    del view
    gc.collect()
    assert buffers.lend(1000).ctypes.data == address


def test_no_more_memory_is_kept_than_allowed() -> None:
    buffers = WarmBuffers(kept_max_nbytes=2500)
    loans = [buffers.lend(1000) for _ in range(4)]
    del loans
    assert buffers.kept_nbytes == 2000


def noting(made: list[int]) -> chunks.MakeMemory:
    """Makes memory, and notes in `made` of what size."""

    def make(nbytes: int) -> chunks.Bytes:
        made.append(nbytes)
        return np.zeros(nbytes, np.uint8)

    return make


def test_what_was_not_used_for_longest_makes_room_for_sizes_that_are_used_now() -> None:
    made: list[int] = []
    buffers = WarmBuffers(kept_max_nbytes=100, make=noting(made))
    for nbytes in range(10, 30):
        buffers.lend(nbytes)
    buffers.lend(50)
    made.clear()
    for _ in range(5):
        assert buffers.lend(50).nbytes == 50
    assert made == [], "memory that was used last is warm"
    assert buffers.kept_nbytes <= 100


def test_batches_that_vary_in_length_use_memory_again() -> None:
    made: list[int] = []
    buffers = WarmBuffers(make=noting(made))
    for nbytes in (1000, 950, 900, 980):
        assert buffers.lend(nbytes).nbytes == nbytes
    assert made == [1000]
    assert buffers.lend(500).nbytes == 500
    assert made == [1000, 500], "half of it would lie idle"


def test_destination_buffers_are_made_as_the_worker_says() -> None:
    made: list[int] = []
    buffers = WarmBuffers(make=noting(made))
    assert buffers.lend(100).nbytes == 100
    assert buffers.lend(100).nbytes == 100
    assert made == [100], "the second is the first one again"


def test_what_is_not_used_between_two_looks_is_given_back() -> None:
    """Of buffers that a burst has left those alone stay that are lent between the looks."""
    made: list[int] = []
    buffers = WarmBuffers(make=noting(made))
    loans = [buffers.lend(nbytes) for nbytes in (1000, 2000, 1000, 3000)]
    loans.clear()
    buffers.trim()
    assert buffers.kept_nbytes == 7000, "all were used since the last look, of which there was none"
    for _ in range(3):
        buffers.lend(2000)
        buffers.trim()
        assert buffers.kept_nbytes == 2000
    assert made == [1000, 2000, 1000, 3000]
    buffers.trim()
    assert buffers.kept_nbytes == 0


def test_memory_that_is_in_use_is_not_given_back() -> None:
    """However often is looked; once it is free again it counts as used."""
    buffers = WarmBuffers()
    loan = buffers.lend(1000)
    loan[:] = 7
    for _ in range(3):
        buffers.trim()
    assert bytes(loan) == bytes([7]) * 1000
    del loan
    buffers.trim()
    assert buffers.kept_nbytes == 1000


def test_what_makes_room_is_not_given_back_twice() -> None:
    """Buffers that the limit drives out between two looks are some of those that were there at the first."""
    buffers = WarmBuffers(kept_max_nbytes=3000)
    loans = [buffers.lend(1000) for _ in range(3)]
    loans.clear()
    buffers.trim()
    buffers.lend(2000)
    buffers.trim()
    assert buffers.kept_nbytes == 2000, "the one that was lent since; it drove out two of the others"


@pytest.mark.parametrize("second", [0, 3])
def test_a_chunk_does_not_come_twice(second: int) -> None:
    """Else a transfer would seem whole, part of which is what others sent into that memory before."""
    receiver = Transfers(Wire().send)
    receiver.receive(A, _chunk(1, 0, 8, b"1234"))
    with pytest.raises(ProtocolError, match="of which more has come"):
        receiver.receive(A, _chunk(1, second, 8, b"5678"))
    with pytest.raises(ProtocolError, match="4 of the 8 bytes"):
        receiver.fetch(A, [1, 8])


def test_a_transfer_that_says_more_than_there_is_memory_for_is_refused() -> None:
    """What is claimed and has not come counts for all transfers together; what has come does not."""
    made: list[int] = []

    def make(nbytes: int) -> chunks.Bytes:
        made.append(nbytes)
        return np.empty(nbytes, np.uint8)

    receiver = Transfers(Wire().send, make, lambda: chunks.CLAIMS_FREE_NBYTES)
    for nbytes in (chunks.CLAIMS_FREE_NBYTES + 1, 1 << 50, (1 << 64) - 1):
        with pytest.raises(ProtocolError, match="are said to come, and there is memory for"):
            receiver.receive(A, _chunk(1, 0, nbytes, b"x"))
    assert not made
    receiver.receive(A, _chunk(2, 0, 100, b"x"))
    with pytest.raises(ProtocolError, match="are said to come"):
        receiver.receive(B, _chunk(2, 0, chunks.CLAIMS_FREE_NBYTES - 50, b"x"))


def test_only_so_many_transfers_wait_for_their_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "INCOMING_MAX", 3)
    receiver = Transfers(Wire().send)
    for number in range(3):
        receiver.receive(A, _chunk(number, 0, 8, bytes(8)))
    with pytest.raises(ProtocolError, match="3 transfers have begun"):
        receiver.receive(A, _chunk(3, 0, 8, bytes(8)))
    receiver.fetch(A, [0, 8])
    receiver.receive(A, _chunk(3, 0, 8, bytes(8)))
