"""Decoders of the transport: chunks, packets, batches, marks and shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from zrpc.errors import ProtocolError
from zrpc.transport import batches, credit, packets
from zrpc.transport.chunks import CLAIMS_FREE_NBYTES, Transfers
from zrpc.transport.shared_memory import SharedMemory
from zrpc.wire import packed_bytes

if TYPE_CHECKING:
    from tests.fuzz.mutation import Frames

A = b"A" * 8


def descriptor_of(raw: bytes) -> list[Any]:
    """A list, as `decode` hands it on."""
    try:
        descriptor = packed_bytes.unpack(raw)
    except Exception as error:
        raise ProtocolError("not for this target") from error
    if type(descriptor) is not list:
        raise ProtocolError("not for this target")
    return descriptor


def _ignore(*_: object) -> None:
    """Nothing is sent."""


class _Pages:
    """Makes memory, and counts which of its pages are there: what is claimed takes none."""

    def __init__(self) -> None:
        self._made: list[Any] = []
        self._libc = ctypes.CDLL(None)

    def make(self, nbytes: int) -> Any:
        try:
            memory = np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8, nbytes)
        except OSError as error:
            raise MemoryError from error
        self._made.append(memory)
        return memory

    def take_nbytes(self) -> int:
        """How many bytes have pages; what was made until now is let go of."""
        pages = 0
        for memory in self._made:
            found = np.zeros(-(-memory.nbytes // mmap.PAGESIZE) + 1, np.uint8)
            self._libc.mincore(
                ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), ctypes.c_void_p(found.ctypes.data)
            )
            pages += int(np.count_nonzero(found & 1))
        self._made.clear()
        return pages * mmap.PAGESIZE


_pages = _Pages()
_transfers = Transfers(_ignore, _pages.make, available_nbytes=lambda: CLAIMS_FREE_NBYTES)


def use_chunks(frames: Frames) -> int:
    transfers = _transfers
    failure = None
    for index in range(0, len(frames) - 1, 2):
        pair = frames[index : index + 2]
        try:
            if transfers.is_chunk(pair):
                transfers.receive(A, pair)
            else:
                bytes(transfers.fetch(A, descriptor_of(pair[0])))
        except ProtocolError as error:
            failure = error
    transfers.forget(A)
    nbytes = _pages.take_nbytes()
    if failure is not None and nbytes < 1 << 20:
        raise failure
    return nbytes


def chunk(number: int, offset: int, nbytes: int, raw: bytes) -> Frames:
    return [struct.pack("<BQQQ", 0xC1, number, offset, nbytes), raw]


def use_packets(frames: Frames) -> int:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    incoming = packets.Incoming(far)
    try:
        near.setblocking(False)
        far.setblocking(False)
        for frame in frames:
            if 0 < len(frame) <= packets.MAX_NBYTES:
                with contextlib.suppress(BlockingIOError):
                    near.send(frame)
        while incoming.receive():
            pass
    finally:
        near.close()
        incoming.close()
    return 0


def packet_seeds() -> list[Frames]:
    messages: list[list[bytes]] = [[b"\x98abc"], [b"\x98abc", b"y" * 5000], [b"x" * 70_000, b"", b"z"]]
    return [[b"".join(map(bytes, packet.pieces)) for packet in packets.cut(message)] for message in messages]


def use_batch(frames: Frames) -> int:
    if batches.is_batch(frames[:1]):
        batches.messages_of(frames[:1])
    if credit.is_mark(frames[:1]):
        credit.answer_of(frames[:1])
        confirmed: credit.Credit[int] = credit.Credit(1 << 20)
        confirmed.send(1, 100)
        confirmed.confirm(credit.total_of(frames[:1]))
    return 0


class Slabs:
    """Slabs of one worker, and another one that receives them."""

    def __init__(self) -> None:
        self.receiver = SharedMemory()

    def run(self, frames: Frames) -> int:
        """The first frame is a descriptor, the second the beginning of a memory file."""
        descriptor = descriptor_of(frames[0] if frames else b"")
        if len(descriptor) < 4:
            raise ProtocolError("that is a descriptor of something else")  # see `Carrier`
        header = frames[1] if len(frames) > 1 else b""
        file = packets.OwnedFile(os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.write(file.fd, header)
        if len(frames) > 2 and len(frames[2]) >= 5:
            nbytes, seals = struct.unpack("<IB", frames[2][:5])
            os.posix_fallocate(file.fd, 0, min(max(nbytes, 1), 1 << 20))
            fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, seals & 0x0F)
        try:
            memory = self.receiver.fetch(A, descriptor, [], [file])
            bytes(memory[:100])
            del memory
        finally:
            self.receiver.forget(A)
        return 0


def slab_seeds() -> list[Frames]:
    header = bytes(8) + (1234).to_bytes(8, "little") + bytes(100)
    file = struct.pack("<IB", 4096 + 8192, 7)
    return [[msgpack.packb([1234, 5000, slot, 0]), header, file] for slot in (-1, 0, 3, -2)]
