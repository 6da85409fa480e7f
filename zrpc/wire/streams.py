"""Pickle streams in pieces: large `bytes`, `bytearray` and `str` of a value are pieces of their own, and not copied.

pickle hands what it makes to the `write` method of a file: about 64 KiB at a time, and `bytes` and `bytearray` of more
than that (also those behind a `PickleBuffer`) as the objects that they are. So a stream that holds much is a list of
pieces, which travel as buffers do, and is read piece by piece, each large object straight into the memory that it will
have. The stream itself is what it would be in one piece: an object that is there twice arrives as one.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any

import numpy as np

from zrpc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.wire.envelope import Buffer

PIECE_MIN_NBYTES = 1 << 16
"""Streams from this size on travel in pieces, and objects of this size are pieces of their own."""

HUGE_MIN_NBYTES = 32 << 20
"""Memory of this size is asked for in large pages."""

_HUGE_PAGE = 2 << 20
_PLACE = struct.Struct("<II")


class Writer:
    """What a pickler writes to."""

    __slots__ = ("_pieces", "write")

    def __init__(self) -> None:
        self._pieces: list[Any] = []  # bytes, bytearray and PickleBuffer
        self.write = self._pieces.append

    def is_large(self) -> bool:
        """Whether the stream is to travel in pieces."""
        return len(self._pieces) > 1 and sum(memoryview(piece).nbytes for piece in self._pieces) >= PIECE_MIN_NBYTES

    def whole(self) -> bytes:
        """The stream in one piece."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def joined(self) -> list[Buffer]:
        """The stream in few pieces: small neighbours are joined, and what can be written to is copied."""
        joined: list[Buffer] = []
        small: list[Any] = []
        for piece in self._pieces:
            seen = piece.raw() if type(piece) is PickleBuffer else memoryview(piece)
            if seen.nbytes < PIECE_MIN_NBYTES:
                small.append(piece)
                continue
            if small:
                joined.append(b"".join(small))
                small = []
            joined.append(seen if seen.readonly else _snapshot(seen))
        if small:
            joined.append(b"".join(small))
        return joined


def place(first: int, count: int) -> bytes:
    """What says that a stream is `count` buffers, from the one of index `first` on."""
    return _PLACE.pack(first, count)


def placed(where: Buffer, buffers: Sequence[Buffer]) -> list[Buffer]:
    """The pieces of the stream of which `place` made `where`.

    Raises:
        ProtocolError: they are not there.
    """
    if len(where) != _PLACE.size:
        raise ProtocolError(f"the place of a stream has {len(where)} bytes instead of {_PLACE.size}")
    first, count = _PLACE.unpack(where)
    if first + count > len(buffers):
        raise ProtocolError(f"a stream is in {count} buffers from {first} on, and {len(buffers)} came")
    return list(buffers[first : first + count])


class Reader:
    """The file that an unpickler reads a stream in pieces from.

    Args:
        pieces: are let go of one by one.
    """

    def __init__(self, pieces: list[Buffer]) -> None:
        self._left = [memoryview(piece) for piece in reversed(pieces)]
        self._seen = 0  # of the last one in `_left`

    def read(self, nbytes: int) -> Buffer:
        """The next bytes; fewer at the end."""
        if self._left and self._seen + nbytes <= len(self._left[-1]):
            self._seen += nbytes
            return self._left[-1][self._seen - nbytes : self._seen]
        rest = bytearray(min(nbytes, sum(map(len, self._left)) - self._seen))
        self.readinto(rest)
        return rest

    def readinto(self, target: Any) -> int:
        """Fill `target` with the next bytes; how many there were."""
        filled = 0
        into = memoryview(target).cast("B")
        while filled < len(into) and self._left:
            piece = self._left[-1]
            count = min(len(into) - filled, len(piece) - self._seen)
            _copy(into[filled : filled + count], piece[self._seen : self._seen + count])
            filled += count
            self._seen += count
            if self._seen == len(piece):
                self._left.pop()
                self._seen = 0
        return filled

    def readline(self) -> Buffer:
        """Pickle asks for lines in streams of old protocols only, which nothing here makes."""
        raise ProtocolError("a pickle stream in pieces is not of protocol 5")


def _copy(target: memoryview, source: memoryview) -> None:
    """Fill memory that nothing has touched yet: if it is large, in pages of 2 MiB, and without the interpreter's lock.

    The system makes most of its pages only now, which takes three times as long as the copy if they have 4 KiB.
    """
    if len(target) < HUGE_MIN_NBYTES:
        target[:] = source
        return
    begin = ctypes.addressof(ctypes.c_char.from_buffer(target))
    start, stop = -(-begin // _HUGE_PAGE) * _HUGE_PAGE, (begin + len(target)) // _HUGE_PAGE * _HUGE_PAGE
    if _madvise is not None:
        _madvise(start, stop - start, mmap.MADV_HUGEPAGE)  # advice: where it is not taken, nothing is lost
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _snapshot(source: memoryview) -> Buffer:
    if len(source) < HUGE_MIN_NBYTES:
        return bytes(source)
    copy = memoryview(mmap.mmap(-1, len(source), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    _copy(copy, source)
    return copy


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # a system other than Linux
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()
