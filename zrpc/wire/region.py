"""Regions: several buffers of one message that travel as one piece of memory.

What: a frame of its own, or a piece of shared memory, costs about as much time for 5 KB as for 100 KB. So where a
message has several buffers that are neither tiny nor large, they are laid out in regions, one after the other. A buffer
becomes a *member*: `[region, offset, nbytes]`, where `region` is the index of the region's own entry among the buffers
of the message, behind those of all buffers. Many tiny buffers are *packed*: the entry of each is nil, all of them lie
one after the other in the last region, and behind its entry stand their sizes, as little-endian 16-bit numbers.

Invariants: members begin on multiples of `ALIGNMENT`. A region has at most `MAX_NBYTES` (one of packed buffers
`MAX_MEMBERS` of them), so that one tensor that is kept holds no more than that. Packed buffers are read-only where they
arrive: who reads them makes a copy.

Threads: none of it is shared.

Failure: members that do not lie within their region, one behind the other, are a `ProtocolError`.
"""

from __future__ import annotations

import reprlib
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Gathered(NamedTuple):
    """What `gather` has laid out."""

    entries: dict[int, list[int] | None]
    """Of members and packed buffers, by their indices."""
    regions: list[Region]
    sizes: bytes | None
    """Of the packed buffers, which lie in the last region; None: there are none."""


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
    tiny = [index for index, nbytes in enumerate(sizes) if 0 <= nbytes <= TINY_MAX_NBYTES]
    chosen = [index for index, nbytes in enumerate(sizes) if TINY_MAX_NBYTES < nbytes <= MEMBER_MAX_NBYTES]
    are_packed = len(tiny) > 1 and sum([sizes[index] for index in tiny]) > TINY_TOTAL_MAX_NBYTES
    if len(chosen) < 2 and not are_packed:
        return None
    entries: dict[int, list[int] | None] = {}
    regions: list[Region] = []
    for index in chosen if len(chosen) > 1 else ():
        nbytes = sizes[index]
        if not regions or regions[-1].nbytes + ALIGNMENT + nbytes > MAX_NBYTES:
            regions.append(Region())
        offset = regions[-1].add(buffers[index], nbytes)
        entries[index] = [len(buffers) + len(regions) - 1, offset, nbytes]
    if not are_packed:
        return Gathered(entries, regions, None)
    packed = b"".join([buffers[index] for index in tiny])
    regions.append(Region())
    regions[-1].add(packed, len(packed))
    entries.update(dict.fromkeys(tiny))
    return Gathered(entries, regions, struct.pack(f"<{len(tiny)}H", *[sizes[index] for index in tiny]))


def _nbytes_of(buffer: Any) -> int:
    """What a buffer takes that may be a member; -1: it may not be one."""
    if type(buffer) is memoryview:
        return buffer.nbytes
    return len(buffer) if isinstance(buffer, bytes | bytearray) else -1


def cut(buffers: list[Any], members: Sequence[int], packed: Sequence[int], are_all_here: bool) -> None:
    """Put views of the regions in the places of what lies in them, and take the regions out.

    Args:
        buffers: entries of members and packed buffers, the sizes of these, and the memory of everything else.
        members: the indices of members.
        packed: the indices of packed buffers.
        are_all_here: whether every region could be opened. Else what lies in the others stays as it is.

    Raises:
        ProtocolError: a member does not lie in a region, or packed buffers do not fill theirs.
    """
    if packed:
        _cut_packed(buffers, packed, are_all_here)
    end = len(buffers)
    filled = (0, 0)  # the region of the last member, and where that ends
    for index in members:
        if index >= end:
            raise ProtocolError(f"buffer {index} should lie in a region, and is one")
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
        if (region, offset) < filled:  # else many of them could be made of little that came
            raise ProtocolError(f"a member {reprlib.repr(entry)} does not lie behind the one before")
        filled = (region, offset + nbytes)
        buffers[index] = memoryview(memory)[offset : offset + nbytes]
    del buffers[end:]


def _cut_packed(buffers: list[Any], packed: Sequence[int], are_all_here: bool) -> None:
    raw = buffers.pop()
    if type(raw) is not bytes or len(raw) != 2 * len(packed) or len(buffers) - 1 in packed:
        raise ProtocolError(f"{len(packed)} packed buffers came, and their sizes are {reprlib.repr(raw)}")
    sizes = struct.unpack(f"<{len(packed)}H", raw)
    memory = buffers.pop()
    if isinstance(memory, list):
        if are_all_here:
            raise ProtocolError(f"packed buffers should lie in a region, and {reprlib.repr(memory)} names a member")
        return
    if sum(sizes) != len(memory):
        raise ProtocolError(f"packed buffers of {sum(sizes)} bytes do not fill their region of {len(memory)}")
    view = memoryview(memory).toreadonly()
    offset = 0
    for index, nbytes in zip(packed, sizes, strict=True):
        buffers[index] = view[offset : (offset := offset + nbytes)]
