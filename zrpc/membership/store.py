"""Membership kept in a torch Store (TCPStore, FileStore, HashStore or what `torchrun` provides).

Each worker writes one record. In a static group the records lie under the ranks, and whoever comes last makes one
roster of them, which all read; in a dynamic one under a counter, so that a look at the counter tells of newcomers.
Nobody watches the store: a newcomer is looked for when a name, rank or incarnation is not known (`refresh`).

What a look finds is told of in the order in which it was found, by one thread at a time: nobody is told to have left
before it was told to have come.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack

from zrpc import remote_text
from zrpc.errors import ProtocolError, RefusedError, RendezvousError
from zrpc.ids import Incarnation, WorkerInfo
from zrpc.membership import records
from zrpc.membership.claims import LEFT, Claims
from zrpc.membership.group import Member, OnJoined, OnLeft

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.membership.claims import HasEnded, Store

POLL_MIN_S = 0.005
ANNOUNCE_WAIT_S = 1.0
"""How long a look waits, at most, for what other threads have found to be told of."""
POLL_MAX_S = 0.5
FAILED_LINGER_S = 2.0
"""How long a worker of a static group that is not complete in time stays, as the others may learn of it through it."""
POLL_SHARE = 0.1
"""Who waits for the others looks at the store each time that it has waited a tenth longer: a hundred workers that look
at a fixed short interval keep the store from serving those who come."""


class StoreGroup:
    """One worker's membership in the group of a store. `refresh` and `leave` are guarded by a lock.

    Args:
        store: the store, shared by all workers of the group and used for nothing else under these keys.
        has_ended: looks whether another worker has ended; see `Claims`.
    """

    def __init__(self, store: Store, has_ended: HasEnded = lambda _address, _life: False) -> None:
        self._store = store
        self._has_ended = has_ended
        self._lock = threading.Lock()
        self._announced = threading.Condition(self._lock)
        self._announcer: int | None = None  # the thread that tells of what was found
        self._found: deque[Callable[[], None]] = deque()  # to be told of, the oldest first
        self._num_found = self._num_told = 0
        self._on_joined: OnJoined = _ignore
        self._on_left: OnLeft = _ignore
        self._dynamic = False
        self._index = 0
        self._seen: dict[int, Member] = {}
        self._suspects: set[int] = set()
        self._claims: Claims | None = None
        self._unread: set[int] = set()
        self._count = 0
        self._me: Member | None = None

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """See `Group.watch`."""
        self._on_joined, self._on_left = on_joined, on_left

    def join(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        incarnation: Incarnation,
        card: dict[str, Any],
        timeout_s: float,
    ) -> tuple[Member, list[Member]]:
        """See `Group.join`."""
        try:
            if world_size:
                return self._join_static(name, rank, world_size, incarnation, card, timeout_s)
            return self._join_dynamic(name, rank, incarnation, card)
        except (RefusedError, RendezvousError):
            raise
        except RuntimeError as error:  # torch's DistError among them
            raise RendezvousError(f"the store failed while {name!r} joined: {error}") from error

    def refresh(self) -> None:
        """See `Group.refresh`. In a static group nobody comes."""
        if not self._dynamic:
            return
        try:
            self._look_for_suspects()
            with self._lock:
                self._read_departures()
                for member in self._read_newcomers():
                    self._find(partial(self._on_joined, member))
        except RuntimeError as error:
            raise RendezvousError(f"the store of the group failed: {error}. Check that its host is up") from error
        self._tell()

    def note_lost(self, incarnation: Incarnation) -> None:
        """See `Group.note_lost`: the next `refresh` looks whether it has ended."""
        with self._lock:
            self._suspects |= {index for index, member in self._seen.items() if member.incarnation == incarnation}

    def linger(self, timeout_s: float) -> None:
        """See `Group.linger`. The store may end with this process, and others may not have read who is here."""
        with contextlib.suppress(RuntimeError):  # the store is gone: so are all who had a use for it
            count = self._store.add("arrived", 0)
            lingering, deadline = self._store.add("lingering", 1), time.monotonic() + timeout_s
            while lingering < count and time.monotonic() < deadline:
                time.sleep(POLL_MIN_S)  # see `_await_roster`
                lingering = self._store.add("lingering", 0)

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        """See `Group.leave`. A static group ends as a whole: there is nothing to say.

        In a dynamic one a goodbye alone makes name and rank free again, so that it is said at exit too.
        """
        del at_exit
        me, self._me = self._me, None
        if me is None or self._claims is None:
            return
        try:
            _set_timeout(self._store, timeout_s)
            self._store.set(f"left/{self._index}", LEFT)
            self._claims.release()
        except RuntimeError:
            return  # the store's host is gone: so is the group

    def _check_kind(self, mine: str) -> None:
        """Whoever comes first says whether the group is static or dynamic."""
        theirs = remote_text.line(self._store.compare_set("kind", "", mine).decode(errors="replace"))
        if theirs != mine:
            raise RefusedError(
                "RPC group mixes statically and dynamically initialized members which is not supported. "
                f"This group is {theirs}: start this worker {'with' if theirs == 'static' else 'without'} world_size, "
                "as the others were"
            )

    # ---- static groups ----------------------------------------------------------------------------------------------

    def _join_static(
        self, name: str, rank: int, world_size: int, incarnation: Incarnation, card: dict[str, Any], timeout_s: float
    ) -> tuple[Member, list[Member]]:
        """Write a record; who comes last makes the roster of all. So the group costs the store a few steps a worker."""
        self._check_kind("static")
        me = Member(WorkerInfo(name, rank), incarnation, card)
        record = records.pack(me, world_size)
        if self._store.compare_set("world_size", "", str(world_size)) != str(world_size).encode():
            self._store.set("roster", msgpack.packb([record]))  # those who wait are to know at once, too
            self._refuse_sizes([(me, world_size)], records.number(self._store.get("world_size"), "world_size"))
        if not self._claim(f"rank/{rank}", incarnation.hex()):
            self._store.set(f"twice/{rank}", b"1")
            raise RefusedError(
                f"rank {rank} is taken by another worker of this group: start each worker with a rank of its own"
            )
        self._store.set(f"member/{rank}", record)
        if self._store.add("arrived", 1) == world_size and self._claim("end", "complete"):
            everybody = [self._store.get(f"member/{other}") for other in range(world_size)]
            self._store.set("roster", msgpack.packb(everybody))
        else:
            self._await_roster(world_size, timeout_s)
        roster = records.unpack_roster(self._store.get("roster"))
        if isinstance(roster, str):
            self.linger(FAILED_LINGER_S)
            raise RendezvousError(roster)
        self._refuse_sizes(roster, world_size)
        members = [member for member, _ in roster]
        _check_names(members)
        self._me = me
        return me, members

    def _refuse_sizes(self, records: list[tuple[Member, int]], world_size: int) -> None:
        """Raise if somebody was started with another size than `world_size`."""
        for member, size in records:
            if size != world_size:
                raise RefusedError(
                    f"{member.info} was started with world_size={size} and others with world_size={world_size}: "
                    "start all workers with the same"
                )

    def _await_roster(self, world_size: int, timeout_s: float) -> None:
        """Wait until the worker that comes last has written the roster.

        The first one whose time is over writes in its place why there is none: a group that lacks it cannot be either,
        and all are to say the same.
        """
        began = time.monotonic()
        while not self._store.check(["roster"]):
            waited_s = time.monotonic() - began
            if waited_s > timeout_s and self._claim("end", "failed"):
                self._store.set("roster", msgpack.packb(self._why_incomplete(world_size, timeout_s)))
                return
            if waited_s > timeout_s + FAILED_LINGER_S:
                raise RendezvousError("all workers came, but the one that came last died before it could tell the rest")
            # A Store offers no event that a FileStore and a TCPStore both have.
            time.sleep(min(max(POLL_MIN_S, waited_s * POLL_SHARE), POLL_MAX_S))

    def _why_incomplete(self, world_size: int, timeout_s: float) -> str:
        absent = [str(rank) for rank in range(world_size) if not self._store.check([f"member/{rank}"])]
        twice = [str(rank) for rank in range(world_size) if self._store.check([f"twice/{rank}"])]
        again = f"; two workers were started with rank {' and with rank '.join(twice)}" if twice else ""
        return (
            f"rank(s) {', '.join(absent) or 'none (who came last died at once)'} did not join within {timeout_s:g} s"
            f"{again}: check that they were started, with the same init_method and world_size"
        )

    # ---- dynamic groups ---------------------------------------------------------------------------------------------

    def _join_dynamic(
        self, name: str, rank: int, incarnation: Incarnation, card: dict[str, Any]
    ) -> tuple[Member, list[Member]]:
        self._check_kind("dynamic")
        self._dynamic = True
        claims = self._claims = Claims(self._store, incarnation, card.get("address") or "", self._has_ended)
        if not claims.take(f"name/{name}"):
            raise RefusedError(f"worker name {name} is not unique: a worker of this group has it. Choose another name")
        if rank < 0:
            rank = next(free for free in range(1 << 16) if claims.take(f"rank/{free}", from_ended=False))
        elif not claims.take(f"rank/{rank}"):
            claims.release()
            raise RefusedError(f"rank {rank} is taken by another worker of this group. Choose another rank")
        me = Member(WorkerInfo(name, rank), incarnation, card)
        self._index = self._count_members(1)
        claims.note_index(self._index)
        self._store.set(f"member/{self._index}", records.pack(me, 0))
        self._unread = set(range(1, self._index))
        self._count = self._index
        others = self._read_newcomers()
        self._me = me
        return me, [*others, me]

    def _claim(self, key: str, mine: str) -> bool:
        return self._store.compare_set(key, "", mine) == mine.encode()

    def _count_members(self, more: int) -> int:
        count = self._store.add("members", more)
        if count - self._count > records.MEMBERS_MAX:
            raise ProtocolError(f"the store of the group says that {count} workers have come")
        return count

    def _read_newcomers(self) -> list[Member]:
        """Those that came since the last look and are still here; one that is still writing its record comes later."""
        count = self._count_members(0)
        self._unread.update(range(self._count + 1, count + 1))
        self._count = max(self._count, count)
        found = []
        for index in sorted(self._unread):
            if self._store.check([f"left/{index}"]):
                self._unread.remove(index)
            elif self._store.check([f"member/{index}"]):
                self._unread.remove(index)
                member, _ = records.unpack(self._store.get(f"member/{index}"))
                self._seen[index] = member
                found.append(member)
        return found

    def _read_departures(self) -> None:
        """Those that are gone since the last look. They are told of first: a newcomer may have the name of one."""
        for index in [index for index in self._seen if self._store.check([f"left/{index}"])]:
            reason = remote_text.line(self._store.get(f"left/{index}").decode(errors="replace"))
            self._suspects.discard(index)
            self._find(partial(self._on_left, self._seen.pop(index).incarnation, reason != LEFT, reason))

    def _look_for_suspects(self) -> None:
        """Of those that this worker cannot reach any more, note in the store which have ended."""
        with self._lock:
            members = [self._seen[index] for index in self._suspects if index in self._seen]
            self._suspects.clear()
        for member in members:
            if self._claims is not None:
                self._claims.note_ended(member.incarnation, member.card.get("address") or "")

    def _find(self, tell: Callable[[], None]) -> None:
        """Something is to be told of. Under the lock."""
        self._found.append(tell)
        self._num_found += 1

    def _tell(self) -> None:
        """Tell of all that was found by now; where another thread is at it, wait until it has."""
        me = threading.get_ident()
        with self._announced:
            wanted = self._num_found
            if self._announcer is not None:
                if self._announcer != me:
                    self._announced.wait_for(lambda: self._num_told >= wanted, ANNOUNCE_WAIT_S)
                return
            self._announcer = me
        tell: Callable[[], None] | None = None
        try:
            while True:
                with self._announced:
                    self._num_told += tell is not None
                    self._announced.notify_all()
                    if not self._found:
                        self._announcer = tell = None
                        return
                    tell = self._found.popleft()
                tell()
        finally:
            with self._announced:
                if self._announcer == me:  # what was told of raised
                    self._num_told += tell is not None
                    self._announcer = None


def _ignore(*_: object) -> None:
    """Nobody watches yet."""


def _set_timeout(store: Store, timeout_s: float) -> None:
    set_timeout = getattr(store, "set_timeout", None)
    if set_timeout is not None:
        set_timeout(timedelta(seconds=timeout_s))


def _check_names(members: list[Member]) -> None:
    ranks: dict[str, int] = {}
    for member in members:
        name, rank = member.info.name, member.info.id
        if name in ranks:
            raise RefusedError(
                f"worker name {name} is not unique: ranks {ranks[name]} and {rank} both have it. "
                "Give each worker a name of its own"
            )
        ranks[name] = rank
