"""Shared memory between workers on one host: one warm copy in, none out.

A sender owns slabs: anonymous memory files (`memfd`), each with one page of header and room for one buffer. To send a
buffer it copies it into a free slab and sends the slab's descriptor, and the first time the file itself (SCM_RIGHTS,
`zrpc.transport.local_links`). The receiver maps the slab, once, and makes its tensor of the mapped memory itself. When
that tensor dies, the receiver writes FREE into the slab's header, and the sender may fill it again. No message tells of
it, so it may happen anywhere, inside a garbage collection too.

Invariants:

- A slab is written by the sender only before anybody is told of it, or while FILLING, and read or written by one
  receiver only while HELD and WHOLE. So a received tensor is its owner's alone, and the sender may write to what it
  sent as soon as `place` has returned, or `fill`, if the copy was put off until the message is on its way
  (`zrpc.transport.filling`).
- A receiver that answers with what it received, and keeps nothing of it, hands the slab back as it is: its owner makes
  a tensor of it, and it stays HELD until that one dies. Whether the receiver keeps nothing is tried: it lets go of what
  it is about to send, and looks whether anybody sees that memory yet.
- A slab whose holder is lost is never filled again: it is RETIRED and let go of. Should the holder live after all,
  what it maps stays as it is.
- A slab that its receiver could not open, for want of open files or mappings, is refused by a message, and free again.
- There are no names: a slab is gone with the last process that has it open or mapped, however that process ends.
  Nothing can be left in /dev/shm, and its size limit (64 MiB in many containers) does not apply.
- Slabs are an optimization: where one cannot be had, buffers travel through sockets, and a warning says so, once.

Slabs are for workers that have a local link: containers that share no socket directory use sockets.

Fresh pages are the enemy: a first touch copies at 0.7-1.6 GB/s, a warm page at up to 18. Slabs are therefore kept and
used again, in size classes at most a quarter larger than what they hold, and the one that was used last first: it is
the one that the processor's caches still hold. Those that are free and were not used for some seconds are let go of
(`SlabPool.trim`); receivers unmap them soon after.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from zrpc import finalizers
from zrpc.errors import ProtocolError
from zrpc.transport.allowance import POOL_MAX_COUNT, POOL_MAX_NBYTES, Allowance
from zrpc.transport.copying import Copier
from zrpc.transport.filling import MAX_NBYTES, Fill
from zrpc.transport.shelf import SWEEP, Shelf
from zrpc.transport.slab import MAX_SLOTS, NO_FILE, NO_SLOT, NOBODY, SLOT, Descriptor, Slab, size_class
from zrpc.wire.envelope import Arriving
from zrpc.wire.region import Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from zrpc.ids import Incarnation
    from zrpc.transport.packets import OwnedFile
    from zrpc.transport.slab import SlabMemory
    from zrpc.wire.envelope import Buffer

log = logging.getLogger("zrpc")

MIN_NBYTES = 65_536
"""Smaller buffers travel as frames: below this, sockets are as fast."""


def is_supported() -> bool:
    """Whether this system has anonymous memory files that other processes can open."""
    return hasattr(os, "memfd_create") and hasattr(os, "MFD_ALLOW_SEALING")


class SlabPool:
    """The slabs that this worker sends in. Any thread may call it; the tables are owned by the lock.

    Threads that read take the lock, so no memory is taken or given back, and nothing is logged, under it.

    Args:
        max_nbytes: what they may take together.
        max_count: how many there may be; each is an open file.
    """

    def __init__(self, max_nbytes: int = POOL_MAX_NBYTES, max_count: int = POOL_MAX_COUNT) -> None:
        self._max_nbytes = max_nbytes
        self._max_count = max_count
        self._lock = threading.Lock()
        self._shelves: defaultdict[int, Shelf] = defaultdict(Shelf)
        self._parting: list[Slab] = []  # see `_part`
        self._nbytes = 0
        self._count = 0
        self._sweeps_to_skip = 0
        self._num_placed = 0
        self._allowance = Allowance()
        self._warned: set[str] = set()
        self._closed = False
        self._copier = Copier()

    def place(
        self, holder: Incarnation, buffer: Buffer | Arriving | Region, later: list[Fill],
        files: list[OwnedFile] | None = None, *, at_once: bool = False,
    ) -> Descriptor | None:  # fmt: skip
        """Copy `buffer` into a slab for `holder`; None where it must travel as a frame. It may then be written to.

        Args:
            holder: who will receive the descriptor.
            buffer: contiguous bytes, or several of them.
            later: gets what is left to do once `holder` was told, if something is.
            files: of the message to `holder`; gets that of the slab, if `holder` does not have it.
            at_once: leave nothing to do.
        """
        nbytes = len(buffer)
        if nbytes < MIN_NBYTES:
            return None
        with self._lock:
            slab = None if self._closed else self._shelves[size_class(nbytes)].take()
            if slab is not None:
                self._give(slab, holder, nbytes)
        if slab is None:
            slab = self._grow(size_class(nbytes), holder, nbytes)
            if slab is None:
                return None
        descriptor = slab.descriptor
        assert descriptor is not None  # it stays as it is: nobody but this thread knows that the slab is held
        if files is not None:
            slab.attach(holder, descriptor, files)
        if nbytes <= MAX_NBYTES and not isinstance(buffer, Arriving) and not at_once:
            slab.memory.begin_filling()
            later.append(Fill(slab, buffer))
            return descriptor
        try:
            self._copy(slab.memory.view(nbytes), buffer)
        except BaseException:  # of a signal handler, or of a device: half of it may still be copied
            self.give_up(descriptor)
            raise
        return descriptor

    def share(self, holders: Sequence[Incarnation], buffer: Buffer | Region) -> dict[Incarnation, Descriptor] | None:
        """Copy `buffer` once into a slab for all of `holders`; None where it must travel as frames.

        Args:
            holders: who will receive the descriptors, each once.
            buffer: contiguous bytes, or several of them. They may be written to afterwards.

        Returns:
            A descriptor for each of them.
        """
        nbytes = len(buffer)
        if nbytes < MIN_NBYTES or len(holders) > MAX_SLOTS:
            return None
        first = self.place(holders[0], buffer, [], at_once=True)
        if first is None:
            return None
        with self._lock:
            slab = self._find(first)
            return None if slab is None or slab.descriptor is not first else slab.share(holders)

    def attach(self, holder: Incarnation, descriptor: Descriptor, files: list[OwnedFile]) -> None:
        """What `share` gave for `holder` goes to it in a message, which has these files."""
        with self._lock:
            slab = self._find(descriptor)
            if slab is not None:
                slab.attach(holder, descriptor, files)

    def fill(self, later: Sequence[Fill]) -> None:
        """Do what `place` has left to do. The buffers may then be written to."""
        for slab, buffer in later:
            self._copy(slab.memory.view(len(buffer)), buffer)
            with self._lock:  # see `zrpc.transport.filling`
                slab.memory.end_filling(is_whole=True)

    def _copy(self, target: npt.NDArray[np.uint8], buffer: Buffer | Arriving | Region) -> None:
        if isinstance(buffer, Region):
            buffer.write_to(target.data)
            return
        if not isinstance(buffer, Arriving):
            self._copier.copy(target, np.frombuffer(buffer, np.uint8))
            return
        start = 0
        for piece in buffer.pieces():
            stop = start + len(piece)
            np.copyto(target[start:stop], np.frombuffer(piece, np.uint8))
            start = stop

    def take_back(self, descriptor: Descriptor) -> None:
        """Nobody was told of `descriptor`, which `place` gave, after all: its slab is free."""
        with self._lock:
            slab = self._find(descriptor)
            if slab is not None:
                slab.withdraw(descriptor)

    def give_up(self, descriptor: Descriptor) -> None:
        """It is not known whether somebody was told of `descriptor`, which `place` gave: let go of its slab.

        Unless its holder has let go of it already, and it was placed anew.
        """
        with self._lock:
            slab = self._find(descriptor)
            if slab is None or not slab.tells(descriptor):
                return
            if slab.memory.is_filling:
                slab.memory.end_filling(is_whole=False)
            if slab in self._parting:
                self._parting.remove(slab)
            else:
                self._shelves[slab.room].placed.remove(slab)
            gone = self._part([slab], next((life for life, one in slab.shares.items() if one is descriptor), NOBODY))
        _retire(gone)

    def take_home(self, holder: Incarnation, descriptor: Descriptor) -> SlabMemory:
        """The memory of a slab that `holder` has handed back: it is held here now.

        Raises:
            ProtocolError: the slab is not with `holder`.
        """
        with self._lock:
            slab = self._find(descriptor)
            if slab is None or slab.holder != holder or slab.memory.is_free():
                raise ProtocolError("a slab came back from a worker that does not hold it")
            slab.take_back()
            return slab.memory

    def refuse(self, holder: Incarnation, descriptor: Descriptor) -> None:
        """`holder` was told of a slab by `descriptor`, and could not open it.

        Raises:
            ProtocolError: the slab is not with `holder`.
        """
        with self._lock:
            slab = self._find(descriptor)
            if slab is None or not slab.refuse(holder, descriptor[SLOT]):
                raise ProtocolError("a slab was refused by a worker that does not hold it")

    def _find(self, descriptor: Descriptor) -> Slab | None:
        """The slab here that `descriptor` tells of, if it is with somebody. Call it under the lock."""
        number, nbytes, *_ = descriptor
        shelf = self._shelves.get(size_class(nbytes)) if type(nbytes) is int else None
        if shelf is None:
            return None
        return next((slab for slab in chain(reversed(shelf.placed), self._parting) if slab.number == number), None)

    def reclaim(self, holder: Incarnation) -> None:
        """`holder` is lost: let go of what it held."""
        with self._lock:
            picked = [slab for shelf in self._shelves.values() for slab in shelf.pick(holder)]
            for slab in chain(self._parting, *((*shelf.placed, *shelf.free) for shelf in self._shelves.values())):
                slab.sent_to.pop(holder, None)
            gone = self._part(picked, holder)
        _retire(gone)

    def trim(self) -> None:
        """Let go of the free slabs that were not used since this was called before; those used last stay."""
        with self._lock:
            gone = self._part((), NOBODY)
            unused = [slab for shelf in self._shelves.values() for slab in shelf.take_unused()]
            self._strike_off(unused)
        _retire([*gone, *unused])

    def counts(self) -> dict[str, int]:
        """How many slabs there are, how many of them are held, their bytes, and how many buffers were placed so far."""
        with self._lock:
            slabs = [slab for shelf in self._shelves.values() for slab in (*shelf.placed, *shelf.free)]
            held = sum(not slab.memory.is_free() for slab in slabs)
            return {"slabs": len(slabs), "held": held, "nbytes": self._nbytes, "placed": self._num_placed}

    def close(self) -> None:
        """Let go of every slab. Idempotent."""
        with self._lock:
            self._closed = True
            left = [slab for shelf in self._shelves.values() for slab in (*shelf.placed, *shelf.free)]
            left += self._parting
            self._strike_off(left)
            self._shelves.clear()
            self._parting.clear()
        _retire(left, at_close=True)
        self._copier.close()

    def _part(self, slabs: Iterable[Slab], holder: Incarnation) -> list[Slab]:
        """These are not to be filled again, since `holder` may see them and will not say. Call it under the lock.

        Shared ones are kept until their other holders have let go: they may not have opened them yet.

        Returns:
            What is to be retired, outside of the lock.
        """
        for slab in slabs:
            slab.part_from(holder)
            self._parting.append(slab)
        gone = [slab for slab in self._parting if not slab.shares or slab.memory.is_free()]
        self._parting = [slab for slab in self._parting if slab not in gone]
        self._strike_off(gone)
        return gone

    def _give(self, slab: Slab, holder: Incarnation, nbytes: int) -> None:
        """`holder` is about to be told of `slab`. Call it under the lock."""
        slab.give(holder, [slab.number, nbytes, NO_SLOT, NO_FILE])
        self._shelves[slab.room].placed.append(slab)
        self._num_placed += 1

    def _grow(self, room: int, holder: Incarnation, nbytes: int) -> Slab | None:
        """A slab of that size for `holder`, where none was free: made, or found among those that are free by now.

        Its place is reserved under the lock; it is made outside, since its pages take up to a second to be there, and
        every slab that comes home waits for the lock.
        """
        if room > self._max_nbytes:
            text = "a buffer of %d MiB goes through sockets: all shared memory of this worker may be %d MiB"
            self._warn(text, nbytes >> 20, self._max_nbytes >> 20)
            return None
        with self._lock:
            gone = self._part((), NOBODY)
            slab = None
            if not self._closed and not self._may_grow(room):
                gone += self._make_way(room)
                slab = self._shelves[room].take()
                if slab is not None:
                    self._give(slab, holder, nbytes)
            is_reserved = slab is None and not self._closed and self._may_grow(room)
            if is_reserved:
                self._nbytes += room
                self._count += 1
            is_full = slab is None and not self._closed and not is_reserved
        _retire(gone)
        if is_full:
            self._warn_without(
                f"{self._count} slabs of {self._nbytes >> 20} MiB in all are held, "
                f"and there may be {self._max_count} of {self._max_nbytes >> 20} MiB"
            )
        if not is_reserved:
            return slab
        made = None
        try:
            made = self._make(room)
        finally:
            with self._lock:
                if made is not None and not self._closed:
                    self._give(made, holder, nbytes)
                    slab = made
                else:
                    self._nbytes -= room
                    self._count -= 1
            if slab is None and made is not None:
                made.retire(at_close=True)
        return slab

    def _may_grow(self, room: int) -> bool:
        return self._nbytes + room <= self._max_nbytes and self._count < self._max_count

    def _make_way(self, room: int) -> list[Slab]:
        """Find free slabs of that size, or let go of such of other sizes until one can be made. Under the lock.

        Returns:
            What to retire, outside of the lock.
        """
        gone: list[Slab] = []
        if self._sweeps_to_skip:
            self._sweeps_to_skip -= 1
            return gone
        for shelf in self._shelves.values():
            shelf.sweep(len(shelf.placed))
        for shelf in self._shelves.values():
            while shelf.free and not self._shelves[room].free and not self._may_grow(room):
                gone.append(shelf.free.pop(0))
                self._strike_off(gone[-1:])
        if not self._shelves[room].free and not self._may_grow(room):
            self._sweeps_to_skip = self._count // SWEEP  # so that on average each buffer looks at a few slabs only
        return gone

    def _make(self, room: int) -> Slab | None:
        """A fresh slab. Call it under no lock."""
        with self._allowance.taking(room, self._warn_without) as is_allowed:
            if not is_allowed:
                return None
            try:
                return Slab.make(room)
            except OSError as error:
                self._warn_without(f"no slab of {room} bytes can be made: {error}")
                return None

    def _strike_off(self, slabs: Iterable[Slab]) -> None:
        """They are the pool's no more. Call it under the lock, and retire them outside: that unmaps memory."""
        for slab in slabs:
            self._nbytes -= slab.room
            self._count -= 1

    def _warn_without(self, reason: str) -> None:
        self._warn("shared memory is not used for now, sockets are: %s", reason)

    def _warn(self, text: str, *args: object) -> None:
        """Say so, once."""
        if text not in self._warned:
            self._warned.add(text)
            finalizers.defer(partial(log.warning, text, *args))


def _retire(slabs: Iterable[Slab], *, at_close: bool = False) -> None:
    for slab in slabs:
        slab.retire(at_close=at_close)
