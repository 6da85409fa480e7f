"""Messages as packets of a Unix socket that keeps packets whole and in order (SOCK_SEQPACKET).

A message of one small frame is one packet, as it is. Every other one is

- where files go with it: `C1 10`, which says that the next packet carries files, and a packet `C1 11` with up to
  `FILES_MAX` of them (SCM_RIGHTS); again, if there are more;
- `C1 12 00 00`, the number of frames and the length of the rest, as little-endian 32 and 64 bits; then the rest, as
  packets of at most `MAX_NBYTES`: the length of each frame (64 bits), and the frames, each padded to `ALIGNMENT`.

Files go ahead because a packet that carries some must be received otherwise, which takes twice as long.
"""

from __future__ import annotations

import array
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zrpc.errors import ProtocolError
from zrpc.transport import descriptors
from zrpc.wire.envelope import INLINE_MAX_NBYTES, nbytes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

log = logging.getLogger("zrpc")

MAX_NBYTES = 65_536
"""Of a packet. What receives one makes room for it first: for 128 KiB that takes 3 us, for 64 KiB 0.1."""
PIECES_MAX = 1024
"""Of a packet, in memory (IOV_MAX); the kernel takes no more in one go."""
FILES_MAX = 250
"""In a packet; the kernel takes 253."""
MESSAGE_MAX_NBYTES = 1 << 40
ALIGNMENT = 16
"""Of frames where they arrive: tensors lie there."""
_FIRST = 0xC1
_OWN_KINDS = 0x10
"""What begins with `_FIRST` and a smaller number is a frame, and no packet of this module's."""
_FILES_FOLLOW, _FILES, _FRAMES = b"\xc1\x10", b"\xc1\x11", b"\xc1\x12"
_HEADER = struct.Struct("<2s2xIQ")
_ANCILLARY_NBYTES = socket.CMSG_SPACE((FILES_MAX + 3) * 4) if hasattr(socket, "CMSG_SPACE") else 0
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""A receiver that is gone is an error, and no SIGPIPE, which a program may have made deadly again."""


class OwnedFile:
    """An open file, closed with the last reference to this.

    Args:
        fd: its descriptor.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Bundle(list[Any]):
    """The frames of a message, and the files that go with it."""

    __slots__ = ("files",)

    def __init__(self, frames: Iterable[Buffer], files: Sequence[OwnedFile]) -> None:
        super().__init__(frames)
        self.files = files


class Packet(NamedTuple):
    """One packet that is to be sent: its bytes, in pieces, and the files that it carries."""

    pieces: Sequence[Buffer]
    files: Sequence[OwnedFile] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return nbytes_of(self.pieces)

    def send(self, sock: socket.socket) -> None:
        """Send it; what raises has sent nothing."""
        if self.files:
            fds = array.array("i", [file.fd for file in self.files])
            sock.sendmsg(self.pieces, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], _NO_SIGNAL)
        elif len(self.pieces) == 1:
            sock.send(self.pieces[0], _NO_SIGNAL)
        else:
            sock.sendmsg(self.pieces, (), _NO_SIGNAL)


def is_whole(frames: Sequence[Buffer]) -> bool:
    """Whether the message is one packet as it is."""
    if len(frames) != 1 or type(frames) is Bundle:
        return False
    frame = frames[0]
    return 0 < len(frame) <= MAX_NBYTES and (frame[0] != _FIRST or (len(frame) > 1 and frame[1] < _OWN_KINDS))


def cut(frames: Sequence[Buffer]) -> list[Packet]:
    """The packets of a message; none for one without frames."""
    if not frames:
        return []
    if is_whole(frames):
        return [Packet(frames)]
    packets: list[Packet] = []
    files = frames.files if isinstance(frames, Bundle) else ()
    for start in range(0, len(files), FILES_MAX):
        packets += Packet((_FILES_FOLLOW,)), Packet((_FILES,), files[start : start + FILES_MAX])
    table = struct.pack(f"<{len(frames)}Q", *map(len, frames))
    parts: list[Buffer] = []
    for part in (table, *frames):
        parts.append(part)
        if padding := -len(part) % ALIGNMENT:
            parts.append(bytes(padding))
    header = _HEADER.pack(_FRAMES, len(frames), nbytes_of(parts))
    pieces: list[Buffer] = []
    room = MAX_NBYTES
    for part in (header, *parts):
        if len(pieces) == PIECES_MAX:
            packets.append(Packet(pieces))
            pieces, room = [], MAX_NBYTES
        if len(part) <= room:  # as a rule
            if part:
                pieces.append(part)
                room -= len(part)
            continue
        rest = memoryview(part).cast("B")
        while rest:
            pieces.append(rest[:room])
            rest = rest[room:]
            room -= len(pieces[-1])
            if not room:
                packets.append(Packet(pieces))
                pieces, room = [], MAX_NBYTES
    if pieces:
        packets.append(Packet(pieces))
    return packets


class Incoming:
    """The receiving end of one connection. Belongs to the thread that reads.

    Args:
        sock: the connection.

    Attributes:
        source: who sends; empty until it has said so.
    """

    __slots__ = ("_count", "_expects_files", "_files", "_filled", "_memory", "sock", "source")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.source: Incarnation = b""
        self._files: list[OwnedFile] = []
        self._memory: memoryview | None = None  # of a message that is not whole yet
        self._filled = 0
        self._count = 0
        self._expects_files = False

    def receive(self) -> list[Buffer] | None:
        """The next message; None: it has not come yet. An empty one: there will be no more.

        Raises:
            ProtocolError: what came is no packet.
            OSError: the connection broke.
        """
        while True:
            if self._memory is not None and self._filled < len(self._memory):
                try:
                    nbytes = self.sock.recv_into(self._memory[self._filled :])
                except BlockingIOError:
                    return None
                if not nbytes:
                    return []
                self._filled += nbytes
                if self._filled == len(self._memory):
                    return self._end()
                continue
            try:
                packet = self._receive_files() if self._expects_files else self.sock.recv(MAX_NBYTES)
            except BlockingIOError:
                return None
            if not packet:
                return []
            if packet[0] != _FIRST or (len(packet) > 1 and packet[1] < _OWN_KINDS):
                return [packet]
            kind = packet[:2]
            if kind == _FILES_FOLLOW:
                self._expects_files = True
            elif kind == _FRAMES and len(packet) >= _HEADER.size:
                self._begin(packet)
                if self._memory is not None and self._filled == len(self._memory):
                    return self._end()
            elif kind != _FILES:
                raise ProtocolError(f"a packet begins with {kind!r}")

    def _receive_files(self) -> bytes:
        """Receive the packet that carries files."""
        packet, ancillary, flags, _ = self.sock.recvmsg(len(_FILES), _ANCILLARY_NBYTES, socket.MSG_CMSG_CLOEXEC)
        self._expects_files = False
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._files += map(OwnedFile, fds)
        if flags & socket.MSG_CTRUNC:
            log.warning("files of a message did not come: this process may open no more (%s)", descriptors.describe())
        return packet

    def _begin(self, packet: bytes) -> None:
        _, self._count, nbytes = _HEADER.unpack_from(packet)
        if not self._count * 8 <= nbytes <= MESSAGE_MAX_NBYTES or len(packet) - _HEADER.size > nbytes:
            raise ProtocolError(f"a message of {self._count} frames and {nbytes} bytes")
        self._filled = len(packet) - _HEADER.size
        try:
            self._memory = np.empty(nbytes, np.uint8).data
        except MemoryError as error:
            raise ProtocolError(f"there is no memory for a message of {nbytes} bytes") from error
        self._memory[: self._filled] = memoryview(packet)[_HEADER.size :]

    def _end(self) -> list[Buffer]:
        memory, files = self._memory, self._files
        assert memory is not None
        self._memory, self._files = None, []
        lengths = struct.unpack_from(f"<{self._count}Q", memory)
        frames: list[Buffer] = []
        start = _padded(self._count * 8)
        for length in lengths:
            frame = memory[start : start + length]
            frames.append(bytes(frame) if length <= INLINE_MAX_NBYTES else frame)
            start += _padded(length)
        if start != len(memory):
            raise ProtocolError(f"a message of {len(memory)} bytes has frames of {sum(lengths)}")
        return Bundle(frames, files) if files else frames


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
