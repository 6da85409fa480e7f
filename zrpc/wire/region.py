"""Regions: several buffers of one message that travel as one piece of memory.

What: a frame of its own, or a piece of shared memory, costs about as much time for 5 KB as for 100 KB. So where a
message has several buffers that are neither tiny nor large, they are laid out in regions, one after the other. A buffer
becomes a *member*: `[region, offset, nbytes]`, where `region` is the index of the region's own entry among the buffers
of the message, behind those of all buffers.

Invariants: members begin on multiples of `ALIGNMENT`. A region has at most `MAX_NBYTES`, so that one tensor that is
kept holds no more than that. Tiny members are read-only where they arrive: who reads them makes a copy.

Threads: none of it is shared.

Failure: members that do not lie within their region are a `ProtocolError`.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from zrpc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    Memory = bytes | bytearray | memoryview

ALIGNMENT = 64
MAX_NBYTES = 2 << 20
MEMBER_MAX_NBYTES = 128 << 10
"""A larger buffer has a frame, or a piece of shared memory, of its own: to copy it takes longer than to send that."""
TINY_MAX_NBYTES = 4096
"""Smaller buffers ride in frame 0, unless they are more than `TINY_TOTAL_MAX_NBYTES` together."""
TINY_TOTAL_MAX_NBYTES = 12_288
MAX_MEMBERS = 1024
"""Of a message with more buffers none is gathered: the thread that reads would take long to cut them."""
MEMBER_LENGTH = 3


class Region:
    """The members of one region, in order.

    Attributes:
        nbytes: how much it takes.
        parts: the members, each with its offset.
    """

    __slots__ = ("_whole", "nbytes", "parts")

    def __init__(self) -> None:
        self.nbytes = 0
        self.parts: list[tuple[int, Memory]] = []
        self._whole: bytearray | None = None

    def __len__(self) -> int:
        return self.nbytes

    def add(self, buffer: Memory, nbytes: int) -> int:
        """Lay `buffer` behind the others; its offset."""
        offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        self.parts.append((offset, buffer))
        self.nbytes = offset + nbytes
        return offset

    def write_to(self, target: memoryview) -> None:
        """Copy all members into `target`, of `nbytes`. What lies between them is left as it is."""
        for offset, buffer in self.parts:
            target[offset : offset + len(buffer)] = buffer

    def joined(self) -> bytearray:
        """All members, as a frame. It is made once."""
        if self._whole is None:
            self._whole = bytearray(self.nbytes)
            self.write_to(memoryview(self._whole))
        return self._whole


Gathered = tuple[dict[int, list[int]], list[Region]]
"""The entries of members by their indices, and the regions."""


class SharedBuffers:
    """The buffers of several envelopes that carry the same to different peers: laid out once, and placed once.

    Owned by the thread that sends them.

    Args:
        buffers: of each envelope, in this order.
        receivers: the incarnations of the peers, each once.

    Attributes:
        gathered: what `gather` says of the buffers.
        placed: by the identity of a buffer or region, what each receiver is to be told of the shared memory that it was
            copied to; who was told is taken out.
    """

    def __init__(self, buffers: Sequence[Any], receivers: Sequence[bytes]) -> None:
        self.buffers = buffers
        self.receivers = receivers
        self.gathered = gather(buffers)
        self.placed: dict[int, dict[bytes, list[Any]]] = {}


def gather(buffers: Sequence[Any]) -> Gathered | None:
    """Lay out those of the buffers of one message that should share regions; None if there are none.

    What is no memory of this process, or not yet (`HandedBack`, `Arriving`), is no member.
    """
    if not 2 <= len(buffers) <= MAX_MEMBERS:
        return None
    sizes = [_nbytes_of(buffer) for buffer in buffers]
    chosen = [index for index, nbytes in enumerate(sizes) if TINY_MAX_NBYTES < nbytes <= MEMBER_MAX_NBYTES]
    if sum(nbytes for nbytes in sizes if nbytes <= TINY_MAX_NBYTES) > TINY_TOTAL_MAX_NBYTES:
        chosen = [index for index, nbytes in enumerate(sizes) if 0 <= nbytes <= MEMBER_MAX_NBYTES]
    elif len(chosen) < 2:
        return None
    members: dict[int, list[int]] = {}
    regions = [Region()]
    for index in chosen:
        nbytes = sizes[index]
        if regions[-1].nbytes + ALIGNMENT + nbytes > MAX_NBYTES:
            regions.append(Region())
        offset = regions[-1].add(buffers[index], nbytes)
        members[index] = [len(buffers) + len(regions) - 1, offset, nbytes]
    return members, regions


def _nbytes_of(buffer: Any) -> int:
    """What a buffer takes that may be a member; -1: it may not be one."""
    if type(buffer) is memoryview:
        return buffer.nbytes
    return len(buffer) if isinstance(buffer, bytes | bytearray) else -1


def cut(buffers: list[Any], members: Sequence[int], are_all_here: bool) -> None:
    """Put what members name in their places, and take the regions out. They are views of the regions.

    Args:
        buffers: entries of members, and the memory of everything else.
        members: their indices.
        are_all_here: whether every region could be opened. Else members of the others stay as they are.

    Raises:
        ProtocolError: a member does not lie in a region.
    """
    end = len(buffers)
    for index in members:
        entry = buffers[index]
        region, offset, nbytes = entry
        if not (type(region) is type(offset) is type(nbytes) is int and members[-1] < region < len(buffers)):
            raise ProtocolError(f"buffer {index} should lie in a region, and {reprlib.repr(entry)} names none")
        end = min(end, region)
        memory = buffers[region]
        if isinstance(memory, list):
            if are_all_here:
                raise ProtocolError(f"buffer {index} should lie in a region, and {reprlib.repr(entry)} names a member")
            continue
        if not 0 <= offset <= offset + nbytes <= len(memory):
            raise ProtocolError(f"a member {reprlib.repr(entry)} does not lie in its region of {len(memory)} bytes")
        view = memoryview(memory)[offset : offset + nbytes]
        buffers[index] = view.toreadonly() if nbytes <= TINY_MAX_NBYTES else view
    del buffers[end:]
