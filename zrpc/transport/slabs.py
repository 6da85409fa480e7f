"""Shared memory between workers on one host: one warm copy in, none out.

A sender owns slabs: anonymous memory files (`memfd`), each with one page of header and room for one buffer. To send a
buffer it copies it into a free slab and sends the slab's descriptor. The receiver maps the slab, once, through
`/proc/PID/fd/FD`, and makes its tensor of the mapped memory itself. When that tensor dies, the receiver writes FREE
into the slab's header, and the sender may fill it again. No message tells of it, so it may happen anywhere, inside a
garbage collection too.

Invariants:

- A slab is written by the sender only while FREE, and read or written by one receiver only while HELD. So a received
  tensor is its owner's alone, and the sender may write to what it sent as soon as `place` has returned.
- A slab whose holder is lost is never filled again: it is RETIRED and let go of. Should the holder live after all,
  what it maps stays as it is.
- There are no names: a slab is gone with the last process that has it open or mapped, however that process ends.
  Nothing can be left in /dev/shm, and its size limit (64 MiB in many containers) does not apply.

Whether two workers can share memory is tried, not guessed: each shows a probe in its membership card, and the other
opens it. So containers on one host, which share its name but not its processes, use sockets.

Fresh pages are the enemy: a first touch copies at 0.7-1.6 GB/s, a warm page at up to 18. Slabs are therefore kept and
used again, in size classes at most a quarter larger than what they hold.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from zrpc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

log = logging.getLogger("zrpc")

MIN_NBYTES = 65_536
"""Smaller buffers travel as frames: below this, sockets are as fast."""
POOL_MAX_NBYTES = 2 << 30
"""What one worker's slabs may take together; beyond it, buffers travel through sockets."""
_HEADER_NBYTES = mmap.PAGESIZE
_FREE, _HELD, _RETIRED = 0, 1, 2
_SCAN = 16
_NUMBER = slice(8, 16)
"""Where in the header the slab's number stands: a random one, so that no other file can be taken for it."""

Descriptor = list[Any]
"""`[pid, fd, number, nbytes]`: where to find a slab, its number, and how much of it is filled."""


def is_supported() -> bool:
    """Whether this system has anonymous memory files that other processes can open."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def size_class(nbytes: int) -> int:
    """The room of the slab that takes `nbytes`: the next of four steps between two powers of two, in whole pages."""
    step = max(mmap.PAGESIZE, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


@dataclass(slots=True, eq=False)
class Slab:
    """One slab of the sender's. Owned by its pool's lock; the header's first byte also by the holder."""

    number: int
    room: int
    fd: int
    memory: mmap.mmap
    holder: Incarnation = b""

    @classmethod
    def make(cls, room: int) -> Slab:
        """A fresh slab whose pages are there.

        Raises:
            OSError: there is not enough memory, or too many files are open.
        """
        fd = os.memfd_create("zrpc-slab", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, _HEADER_NBYTES + room)
            memory = mmap.mmap(fd, _HEADER_NBYTES + room, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except BaseException:
            os.close(fd)
            raise
        raw = os.urandom(8)
        memory[_NUMBER] = raw
        return cls(int.from_bytes(raw, "little"), room, fd, memory)

    def is_free(self) -> bool:
        return self.memory[0] == _FREE

    def retire(self) -> None:
        """Let go of it; who maps it still may keep it. It is unmapped here once nobody copies into it any more."""
        self.memory[0] = _RETIRED
        os.close(self.fd)


class SlabPool:
    """The slabs that this worker sends in. Any thread may call it; the tables are owned by the lock."""

    def __init__(self, max_nbytes: int = POOL_MAX_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self._lock = threading.Lock()
        self._by_room: defaultdict[int, deque[Slab]] = defaultdict(deque)
        self._nbytes = 0
        self._has_warned = False
        self._closed = False
        self._pid = os.getpid()

    def place(self, holder: Incarnation, buffer: Buffer) -> Descriptor | None:
        """Copy `buffer` into a slab for `holder`; None where it must travel as a frame. It may then be written to.

        Args:
            holder: who will receive the descriptor.
            buffer: contiguous bytes.
        """
        nbytes = len(buffer)
        if nbytes < MIN_NBYTES:
            return None
        with self._lock:
            slab = None if self._closed else self._take(size_class(nbytes))
            if slab is None:
                return None
            slab.memory[0] = _HELD
            slab.holder = holder
        target = np.frombuffer(slab.memory, np.uint8, nbytes, _HEADER_NBYTES)
        np.copyto(target, np.frombuffer(buffer, np.uint8))  # lets go of the interpreter's lock
        return [self._pid, slab.fd, slab.number, nbytes]

    def reclaim(self, holder: Incarnation) -> None:
        """`holder` is lost: let go of what it held."""
        with self._lock:
            for slabs in self._by_room.values():
                for slab in [slab for slab in slabs if slab.holder == holder and not slab.is_free()]:
                    slabs.remove(slab)
                    self._let_go(slab)

    def close(self) -> None:
        """Let go of every slab. Idempotent."""
        with self._lock:
            self._closed = True
            for slabs in self._by_room.values():
                while slabs:
                    self._let_go(slabs.popleft())

    def _take(self, room: int) -> Slab | None:
        """A free slab of that size, last in its queue; made if need be. Call it under the lock."""
        slabs = self._by_room[room]
        for _ in range(min(_SCAN, len(slabs))):
            slab = slabs.popleft()
            slabs.append(slab)
            if slab.is_free():
                return slab
        if self._nbytes + room > self._max_nbytes:
            self._evict(self._nbytes + room - self._max_nbytes)
        if self._nbytes + room > self._max_nbytes:
            self._warn(f"its slabs hold {self._nbytes >> 20} MiB that the receivers have not let go of")
            return None
        try:
            slab = Slab.make(room)
        except OSError as error:
            self._warn(f"no slab of {room} bytes can be made: {error}")
            return None
        self._nbytes += room
        slabs.append(slab)
        return slab

    def _evict(self, nbytes: int) -> None:
        """Let go of free slabs of any size, until `nbytes` are gained or there are none."""
        for slabs in self._by_room.values():
            for slab in [slab for slab in slabs if slab.is_free()]:
                if nbytes <= 0:
                    return
                slabs.remove(slab)
                nbytes -= slab.room
                self._let_go(slab)

    def _let_go(self, slab: Slab) -> None:
        self._nbytes -= slab.room
        slab.retire()

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("shared memory is not used for now, sockets are: %s", reason)


class Attachments:
    """The slabs of others that this worker has mapped. The table is owned by the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[tuple[Incarnation, int], mmap.mmap] = {}
        self._loans: dict[int, weakref.ref[Any]] = {}

    def fetch(self, source: Incarnation, descriptor: Descriptor) -> memoryview:
        """The memory that `descriptor` of the worker `source` tells of; free again once nobody sees it any more.

        Raises:
            ProtocolError: the slab is not there, or it is smaller.
        """
        if [type(part) for part in descriptor] != [int] * 4:
            raise ProtocolError(f"{descriptor!r} describes no slab")
        pid, fd, number, nbytes = descriptor
        memory = self._map(source, pid, fd, number)
        if not 0 < nbytes <= len(memory) - _HEADER_NBYTES:
            raise ProtocolError(f"a slab of process {pid} has no room for {nbytes} bytes")
        loan = np.frombuffer(memory, np.uint8, nbytes, _HEADER_NBYTES)

        def give_back(reference: weakref.ref[Any]) -> None:
            self._loans.pop(id(reference), None)
            if memory[0] == _HELD:
                memory[0] = _FREE

        reference = weakref.ref(loan, give_back)
        self._loans[id(reference)] = reference
        return loan.data

    def forget(self, source: Incarnation) -> None:
        """`source` is gone: keep nothing mapped of it but what is in use."""
        with self._lock:
            for key in [key for key in self._mapped if key[0] == source]:
                del self._mapped[key]

    def close(self) -> None:
        """Keep nothing mapped but what is in use."""
        with self._lock:
            self._mapped.clear()

    def _map(self, source: Incarnation, pid: int, fd: int, number: int) -> mmap.mmap:
        with self._lock:
            memory = self._mapped.get((source, number))
            if memory is not None:
                return memory
            for key in [key for key, known in self._mapped.items() if known[0] == _RETIRED]:
                del self._mapped[key]
            try:
                memory = _open(pid, fd)
            except (OSError, ValueError) as error:
                raise ProtocolError(f"a slab of process {pid} cannot be mapped: {error}") from error
            if int.from_bytes(memory[_NUMBER], "little") != number:
                raise ProtocolError(f"a slab of process {pid} is gone: another file stands in its place")
            self._mapped[source, number] = memory
            return memory


class SharedMemory:
    """All of it, for one worker: slabs to send in, slabs of others, and with whom memory can be shared.

    Raises:
        OSError: no memory file can be made here.
    """

    def __init__(self) -> None:
        self._probe = Probe()
        self._pool = SlabPool()
        self._attachments = Attachments()
        self._sharing: dict[Incarnation, bool] = {}

    def card(self) -> list[Any]:
        """What to tell the others in the membership card."""
        return self._probe.card()

    def meet(self, peer: Incarnation, card: Any) -> None:
        """Try whether memory can be shared with `peer`, whose card said `card` of it."""
        self._sharing[peer] = can_open(card)

    def placing(self, peer: Incarnation) -> Callable[[Buffer], Descriptor | None] | None:
        """`SlabPool.place` for that peer; None where memory cannot be shared with it."""
        return partial(self._pool.place, peer) if self._sharing.get(peer) else None

    def fetch(self, source: Incarnation, descriptor: Descriptor) -> memoryview:
        """See `Attachments.fetch`."""
        return self._attachments.fetch(source, descriptor)

    def forget(self, peer: Incarnation) -> None:
        """`peer` is gone."""
        self._sharing.pop(peer, None)
        self._pool.reclaim(peer)
        self._attachments.forget(peer)

    def close(self) -> None:
        """Let go of everything; memory of others that is in use stays until it is not."""
        self._pool.close()
        self._attachments.close()
        self._probe.close()


class Probe:
    """What a worker shows the others so that they can try whether they can open its memory."""

    def __init__(self) -> None:
        self._nonce = os.urandom(16)
        self._fd = os.memfd_create("zrpc-probe", os.MFD_CLOEXEC)
        os.write(self._fd, self._nonce)

    def card(self) -> list[Any]:
        """What goes into the membership card."""
        return [os.getpid(), self._fd, self._nonce]

    def close(self) -> None:
        """Show nothing any more."""
        os.close(self._fd)


def can_open(card: Any) -> bool:
    """Whether the probe of `card` can be opened here: then so can the slabs of its worker, and ours there."""
    try:
        pid, fd, nonce = card
        with open(_path(pid, fd), "rb") as probe:
            return bool(probe.read(len(nonce) + 1) == nonce)
    except (OSError, TypeError, ValueError):
        return False


def _path(pid: int, fd: int) -> str:
    return f"/proc/{pid:d}/fd/{fd:d}"


def _open(pid: int, fd: int) -> mmap.mmap:
    opened = os.open(_path(pid, fd), os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(opened, 0, flags=mmap.MAP_SHARED)
    finally:
        os.close(opened)
