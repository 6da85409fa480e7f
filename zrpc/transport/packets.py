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
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zrpc import finalizers
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
FILES_MESSAGE_MAX = 4096 + FILES_MAX
"""In a message: one for each slab that a worker may have, and what fills the last packet."""
MIN_NBYTES = 4096
"""Of a packet of a message of frames, unless it is the last one: 1024 pieces, of which every other has 16 bytes or is
followed by what makes it 16, come to twice that. Smaller ones would take many times their size here."""
ALIGNMENT = 16
"""Of frames where they arrive: tensors lie there."""
_FIRST_BYTE, _OWN_KIND = b"\xc1", b"\xc1\x10"
"""What begins with the first and is less than the second is a frame, and no packet of this module's."""
_FILES_FOLLOW, _FILES, _FRAMES = b"\xc1\x10", b"\xc1\x11", b"\xc1\x12"
_STARTS = (_FILES_FOLLOW, _FRAMES)
_FIRST_INDEX = (0,)
_HEADER = struct.Struct("<2s2xIQ")
_ANCILLARY_NBYTES = socket.CMSG_SPACE((FILES_MAX + 3) * 4) if hasattr(socket, "CMSG_SPACE") else 0
_NBYTES = (MAX_NBYTES,)
_RECEIVE_FILES = ((len(_FILES),), (_ANCILLARY_NBYTES,), (getattr(socket, "MSG_CMSG_CLOEXEC", 0),))
_IS_COLLECTED_BETWEEN = sys.version_info >= (3, 12)
"""Whether destructors may run between any two bytecodes; else they run only where a call makes memory."""
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
    """The frames of a message, and the files that go with it; of one that came, None in place of those that did not."""

    __slots__ = ("files",)

    def __init__(self, frames: Iterable[Buffer], files: Sequence[OwnedFile | None]) -> None:
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

    def copied(self) -> Packet:
        """The same, in memory of its own."""
        return Packet((b"".join(self.pieces),), self.files)

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
    return 0 < len(frame) <= MAX_NBYTES and (frame[0] != _FIRST_BYTE[0] or _FIRST_BYTE < bytes(frame[:2]) < _OWN_KIND)


def cut(frames: Sequence[Buffer]) -> list[Packet]:
    """The packets of a message; none for one without frames."""
    if not frames:
        return []
    if is_whole(frames):
        return [Packet(frames)]
    packets: list[Packet] = []
    files = [file for file in frames.files if file] if isinstance(frames, Bundle) else ()
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

    A destructor of a user may run wherever memory is made, and wait, so that its thread receives here in the middle of
    a message: see `zrpc.transport.multipart`, which has the same task for ZeroMQ's messages.

    Args:
        sock: the connection.

    Attributes:
        source: who sends; empty until it has said so.
    """

    __slots__ = ("_begun", "sock", "source")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.source: Incarnation = b""
        self._begun: list[Any] = []  # the packets of the next message; what `recvmsg` gave for one with files

    def say_source(self, source: Incarnation) -> None:
        """The first message came, and said who sends."""
        self.source = source

    def close(self) -> None:
        """Receive nothing any more; the files of a message that has not come whole are closed too."""
        self.sock.close()
        for packet in self._begun:
            if type(packet) is tuple:
                _files_of(packet)

    def receive(self) -> list[Buffer] | None:
        """The next message; None: it has not come yet. An empty one: there will be no more.

        Raises:
            ProtocolError: what came is no packet.
            OSError: the connection broke.
        """
        recv = self.sock.recv
        while True:
            rest: list[Any] = []  # what comes after; made first, since a destructor may run here
            begun = self._begun
            if not begun or not _is_complete(begun.copy()):
                try:
                    if begun and _awaits_files(begun.copy()):
                        begun.extend(map(self.sock.recvmsg, *_RECEIVE_FILES))
                    elif _IS_COLLECTED_BETWEEN:  # nothing comes between taking a packet and keeping it
                        begun.extend(map(recv, _NBYTES))
                    else:
                        begun.append(recv(MAX_NBYTES))
                except BlockingIOError:
                    return None
            while begun is not self._begun and begun:  # what was begun has been received meanwhile
                later = self._begun
                later.extend(map(begun.pop, _FIRST_INDEX))
                begun = later
            packets = begun.copy()
            if not packets:
                continue
            if not packets[-1]:
                return []
            if _is_complete(packets) and self._begun is begun:
                self._begun = rest  # after `is` nothing runs before this
                begun.clear()
                return packets if packets[0][:2] not in _STARTS else _message_of(packets)


def _awaits_files(packets: Sequence[Any]) -> bool:
    """Whether the next packet of a message carries files."""
    at = 0
    while at < len(packets) and packets[at] == _FILES_FOLLOW:
        at += 2
    return at > len(packets)


def _is_complete(packets: Sequence[Any]) -> bool:
    """Whether a message ends with the last of `packets`."""
    first = packets[0]
    if first[:1] != _FIRST_BYTE or _FIRST_BYTE < first[:2] < _OWN_KIND:  # as a rule
        return True
    at = 0
    while packets[at] == _FILES_FOLLOW:
        at += 2
        if at * FILES_MAX > 2 * FILES_MESSAGE_MAX:
            raise ProtocolError(f"a message with files in {at // 2} packets")
        if at >= len(packets):
            return False
    first = packets[at]
    if first[:2] != _FRAMES or len(first) < _HEADER.size:
        raise ProtocolError(f"a packet begins with {first[:2]!r}")
    _, count, nbytes = _HEADER.unpack_from(first)
    if not 0 < count * 8 <= nbytes <= MESSAGE_MAX_NBYTES:
        raise ProtocolError(f"a message of {count} frames and {nbytes} bytes")
    if sum(map(len, packets[at:])) - _HEADER.size >= nbytes:
        return True
    if len(packets[-1]) < MIN_NBYTES:
        raise ProtocolError(f"a packet of {len(packets[-1])} bytes is not the last of a message of {nbytes}")
    return False


def _message_of(packets: Sequence[Any]) -> list[Buffer]:
    files: list[OwnedFile | None] = []
    at = 0
    while packets[at] == _FILES_FOLLOW:
        files += _files_of(packets[at + 1])
        at += 2
    _, count, nbytes = _HEADER.unpack_from(packets[at])
    memory = np.empty(nbytes, np.uint8).data
    start = 0
    for packet in packets[at:]:
        piece = memoryview(packet)[0 if start else _HEADER.size :]
        if start + len(piece) > nbytes:
            raise ProtocolError(f"more came than the {nbytes} bytes of a message")
        memory[start : start + len(piece)] = piece
        start += len(piece)
    lengths = struct.unpack_from(f"<{count}Q", memory)
    frames: list[Buffer] = []
    start = _padded(count * 8)
    for length in lengths:
        frame = memory[start : start + length]
        frames.append(bytes(frame) if length <= INLINE_MAX_NBYTES else frame)
        start += _padded(length)
    if start != len(memory):
        raise ProtocolError(f"a message of {len(memory)} bytes has frames of {sum(lengths)}")
    return Bundle(frames, files) if files else frames


def _files_of(received: tuple[bytes, list[tuple[int, int, bytes]], int, Any]) -> list[OwnedFile | None]:
    """The files that came with a packet, and None for each that may have been cut off behind them."""
    _, ancillary, flags, _ = received
    files: list[OwnedFile | None] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds = array.array("i")
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            files += map(OwnedFile, fds)
    if flags & socket.MSG_CTRUNC:
        text = "files of a message did not come: this process may open no more (%s); raise the limit with `ulimit -n`"
        finalizers.defer(partial(log.warning, text, descriptors.describe()))
        files += [None] * (FILES_MAX - len(files))
    return files


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
