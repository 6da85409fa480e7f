"""One slab: an anonymous memory file (`memfd`), a page of header and room for one buffer.

The header, by byte: 0 whether a receiver holds it (HELD or FREE), 1 whether its owner has let go of it (RETIRED, CLOSED
if it shut down, or neither), 2 whether its owner is still filling it (WHOLE, FILLING, or TORN if it gave up), 8 to 15
the slab's number. The sender writes HELD, the receiver FREE, the owner alone the others: no byte is ever written by two
at once.

A slab may also be *shared*: several receivers hold it, each with a slot of its own, which is a byte from 64 on. They
map its room privately: a page that one of them writes to is its own copy from then on (copy-on-write).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from zrpc.transport.mapping import drop_pages, map_file
from zrpc.transport.packets import OwnedFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

HEADER_NBYTES = mmap.PAGESIZE
_FREE, _HELD = 0, 1
_RETIRED, _CLOSED = 1, 2
_WHOLE, _FILLING, _TORN = 0, 1, 2
_STATE, _OWNED, _CONTENT = 0, 1, 2
_SLOTS_AT = 64
MAX_SLOTS = HEADER_NBYTES - _SLOTS_AT
_NUMBER = slice(8, 16)
"""Where the slab's number stands: a random one, so that no other file can be taken for it."""

_SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0)

_BLOCK_NBYTES = 512
"""What `st_blocks` counts, whatever the file system."""
NOBODY = b""
"""In place of the worker that holds a slab, or owns it: it came home."""

DESCRIPTOR_LENGTH = 4
Descriptor = list[Any]
"""`[number, nbytes, slot, file]`: of a slab its number, how much of it is filled, the receiver's slot if it is shared
(else `NO_SLOT`, or `HANDED_BACK` if it is the receiver's own), and which file of the message it is (`NO_FILE`: the
receiver has it already)."""
NUMBER, NBYTES, SLOT, FILE = range(DESCRIPTOR_LENGTH)
NO_SLOT, HANDED_BACK, NO_FILE = -1, -2, -1


def size_class(nbytes: int) -> int:
    """The room of the slab that takes `nbytes`: the next of four steps between two powers of two, in whole pages."""
    step = max(mmap.PAGESIZE, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


def address_of(buffer: Buffer) -> int:
    """Where `buffer` begins in the memory of this process."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))  # bytes raise
    except (TypeError, ValueError):  # it cannot be written to, or is empty
        address: int = np.frombuffer(buffer, np.uint8).ctypes.data
        return address


class Pins(Protocol):
    """Pins memory for devices. No call may be made while a device copies from that memory."""

    def register(self, address: int, nbytes: int) -> bool:
        """Pin memory, in whole pages; false where that does not work."""

    def unregister(self, address: int) -> None:
        """Undo it. The memory must still be there."""


class SlabMemory:
    """A slab as it is mapped into this process, by its owner or by who received it.

    Attributes:
        address: where its room begins.
        is_left: this process keeps it no longer: its owner is lost or has let go of it, or this worker has shut down.
        was_pinned: whether to pin it was tried, or will not be any more.
    """

    __slots__ = ("_mapped", "_num_slots", "_pid", "_pins", "address", "is_left", "was_pinned")

    def __init__(self, mapped: memoryview) -> None:
        self._mapped = mapped
        self._num_slots = 0
        self._pid = os.getpid()
        self.address = address_of(mapped) + HEADER_NBYTES
        self.is_left = False
        self.was_pinned = False
        self._pins: Pins | None = None  # of who has pinned it

    @property
    def number(self) -> int:
        """The slab's number."""
        return int.from_bytes(self._mapped[_NUMBER], "little")

    @property
    def room(self) -> int:
        """How many bytes it takes."""
        return len(self._mapped) - HEADER_NBYTES

    def is_free(self) -> bool:
        """Whether nobody holds it, nor fills it: who was to receive it may have let go of it before it was whole."""
        if self._num_slots:
            return not any(self._mapped[_SLOTS_AT : _SLOTS_AT + self._num_slots])
        return self._mapped[_STATE] == _FREE and self._mapped[_CONTENT] != _FILLING

    @property
    def is_filling(self) -> bool:
        """Whether its owner is about to fill it, or at it."""
        return self._mapped[_CONTENT] == _FILLING

    @property
    def is_torn(self) -> bool:
        """Whether its owner has given up to fill it."""
        return self._mapped[_CONTENT] == _TORN

    def is_retired(self) -> bool:
        """Whether its owner has let go of it."""
        return self._mapped[_OWNED] != 0

    def is_over(self) -> bool:
        """The same, but the last messages of an owner that shut down may be unread, and tell of it."""
        return self._mapped[_OWNED] == _RETIRED

    def set_number(self, number: int) -> None:
        """Give it its number. For its owner, before anybody else sees it."""
        self._mapped[_NUMBER] = number.to_bytes(8, "little")

    def hold(self) -> None:
        """It is held by one receiver from now on. For its owner."""
        self._num_slots = 0
        self._mapped[_STATE] = _HELD

    def share(self, count: int) -> None:
        """It is held by so many receivers from now on, by the first `count` slots. For its owner."""
        self._mapped[_SLOTS_AT : _SLOTS_AT + count] = bytes([_HELD]) * count
        self._num_slots = count

    def free_slot(self, slot: int) -> None:
        """One of them holds it no more, or was not told of it. For its owner."""
        self._mapped[_SLOTS_AT + slot] = _FREE

    def free(self) -> None:
        """Nobody holds it any more. For its holder, or its owner where nobody was told of it.

        A child that was forked holds what its parent holds, and lets go of nothing.
        """
        if os.getpid() == self._pid:
            self._mapped[_STATE] = _FREE

    def begin_filling(self) -> None:
        """What belongs into it comes later. For its owner, before it tells the receiver of it."""
        self._mapped[_CONTENT] = _FILLING

    def end_filling(self, *, is_whole: bool) -> None:
        """It is filled now, or will not be. For its owner."""
        self._mapped[_CONTENT] = _WHOLE if is_whole else _TORN

    def leave(self) -> None:
        """Keep it no longer: its owner is lost, or this worker has shut down."""
        self.is_left = True
        self.unpin()

    def retire(self, *, at_close: bool) -> None:
        """Its owner has let go of it, and shuts down if `at_close`. For its owner."""
        self._mapped[_OWNED] = _CLOSED if at_close else _RETIRED

    def pin(self, pins: Pins) -> None:
        """Pin it, unless that was tried before. For attachments, under their lock."""
        if not self.was_pinned:
            self.was_pinned = True
            self._pins = pins if pins.register(self.address - HEADER_NBYTES, len(self._mapped)) else None

    def unpin(self) -> None:
        """Undo it; it is not pinned again."""
        self.was_pinned = True
        pins, self._pins = self._pins, None
        if pins is not None:
            pins.unregister(self.address - HEADER_NBYTES)

    def view(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Its first `nbytes`, writable, not copied; they stay mapped as long as anybody sees them."""
        return np.frombuffer(self._mapped, np.uint8, nbytes, HEADER_NBYTES)


class PrivateSlab(SlabMemory):
    """A shared slab as one of its receivers maps it: what it writes there no other process sees.

    Args:
        header: the slab's header, shared with its owner.
        room: the rest of it, mapped privately.
        slot: of this receiver.
    """

    __slots__ = ("_room", "_slot")

    def __init__(self, header: memoryview, room: memoryview, slot: int) -> None:
        super().__init__(header)
        self._room = room
        self._slot = slot
        self.address = address_of(room)
        self.was_pinned = True  # pages that are dropped must not be

    @property
    def room(self) -> int:
        """How many bytes it takes."""
        return len(self._room)

    def free(self) -> None:
        """This receiver holds it no more."""
        if os.getpid() == self._pid:
            self.free_slot(self._slot)

    def renew(self) -> None:
        """Drop the pages that were written to here: it was filled anew."""
        drop_pages(self._room)

    def view(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """See `SlabMemory.view`."""
        return np.frombuffer(self._room, np.uint8, nbytes)


@dataclass(slots=True, eq=False)
class Slab:
    """One slab of the sender's. Owned by its pool's lock."""

    number: int
    room: int
    file: OwnedFile | None
    memory: SlabMemory
    holder: Incarnation = b""
    descriptor: Descriptor | None = None
    """The very list that `holder` is told of it by: another time it is another one."""
    shares: dict[Incarnation, Descriptor] = field(default_factory=dict)
    """Of a shared slab, the same for each holder."""
    sent_to: dict[Incarnation, set[int]] = field(default_factory=dict)
    """Who has its file already, and maps it for these slots."""
    last_use: object = None
    """By which it was in use when `was_used` was asked before."""

    @classmethod
    def make(cls, room: int) -> Slab:
        """A fresh slab whose pages are there.

        Raises:
            OSError: there is not enough memory, or too many files are open.
        """
        file = OwnedFile(os.memfd_create("zrpc-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.posix_fallocate(file.fd, 0, HEADER_NBYTES + room)
        fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        memory = SlabMemory(map_file(file.fd, HEADER_NBYTES + room, populate=True))
        number = int.from_bytes(os.urandom(8), "little")
        memory.set_number(number)
        return cls(number, room, file, memory)

    def give(self, holder: Incarnation, descriptor: Descriptor) -> None:
        """`holder` is about to be told of it by `descriptor`."""
        self.memory.hold()
        self.holder, self.descriptor, self.shares = holder, descriptor, {}

    def share(self, holders: Sequence[Incarnation]) -> dict[Incarnation, Descriptor]:
        """All of `holders` are about to be told of it, instead of the one that it was given to; by what descriptors."""
        assert self.descriptor is not None
        number, nbytes, *_ = self.descriptor
        self.shares = {life: [number, nbytes, slot, NO_FILE] for slot, life in enumerate(holders)}
        self.memory.share(len(holders))
        self.holder, self.descriptor = NOBODY, None
        return dict(self.shares)

    def tells(self, descriptor: Descriptor) -> bool:
        """Whether this very list tells a holder of it now."""
        return descriptor is self.descriptor or any(descriptor is one for one in self.shares.values())

    def attach(self, holder: Incarnation, descriptor: Descriptor, files: list[OwnedFile]) -> None:
        """`descriptor` goes to `holder` in a message: its file goes with it, if `holder` does not have it."""
        file, slots = self.file, self.sent_to.setdefault(holder, set())
        if descriptor[SLOT] not in slots and file is not None:
            slots.add(descriptor[SLOT])
            descriptor[FILE] = len(files)
            files.append(file)

    def withdraw(self, descriptor: Descriptor) -> None:
        """The message that was to tell a holder of it by this very list is not sent."""
        if descriptor is self.descriptor:
            holder = self.holder
            self.memory.end_filling(is_whole=True)
            self.memory.free()
        elif self.tells(descriptor):
            holder = next(life for life, one in self.shares.items() if one is descriptor)
            self.memory.free_slot(descriptor[SLOT])
        else:
            return
        if descriptor[FILE] != NO_FILE:
            self.sent_to.get(holder, set()).discard(descriptor[SLOT])

    def refuse(self, holder: Incarnation, slot: int) -> bool:
        """`holder` could not open it: it does not hold it, nor have its file. False: it was not told of it."""
        if holder in self.shares and self.shares[holder][SLOT] == slot:
            self.memory.free_slot(slot)
        elif holder == self.holder and slot == NO_SLOT:
            self.memory.free()
        else:
            return False
        self.sent_to.get(holder, set()).discard(slot)
        return True

    def part_from(self, holder: Incarnation) -> None:
        """`holder` will not say that it has let go of it. It is not to be filled again."""
        if holder in self.shares:
            self.memory.free_slot(self.shares[holder][SLOT])
        else:
            self.shares = {}

    def was_used(self) -> bool:
        """Whether it was given to a holder since this was asked before."""
        use = self.shares if self.descriptor is None else self.descriptor  # each time another one
        last, self.last_use = self.last_use, use
        return use is not last

    def take_back(self) -> None:
        """Its holder has given it back."""
        self.holder = NOBODY

    def retire(self, *, at_close: bool) -> None:
        """Let go of it; who maps it still may keep it. It is unmapped here once nobody copies into it any more."""
        self.memory.retire(at_close=at_close)
        self.memory.unpin()
        self.file = None  # messages that wait may have it still


def open_slab(file: OwnedFile, slot: int = NO_SLOT) -> SlabMemory:
    """The slab in a file that came with a message; with a `slot`, for the receiver that has that one of a shared slab.

    Raises:
        OSError: it cannot be mapped, or it is no slab: no memory file, smaller than a header, without memory of
            its own, or it may shrink.
    """
    found = os.fstat(file.fd)
    if not stat.S_ISREG(found.st_mode) or fcntl.fcntl(file.fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise OSError(errno.EINVAL, "it is no sealed memory file")
    nbytes = found.st_size
    if nbytes <= HEADER_NBYTES:
        raise OSError(errno.EINVAL, "it is no slab")
    if found.st_blocks * _BLOCK_NBYTES < nbytes:
        raise OSError(errno.EINVAL, "its memory is not there: who reads it would have to pay for it")
    if slot == NO_SLOT:
        return SlabMemory(map_file(file.fd, nbytes))
    header = map_file(file.fd, HEADER_NBYTES)
    return PrivateSlab(header, map_file(file.fd, nbytes - HEADER_NBYTES, offset=HEADER_NBYTES, private=True), slot)
