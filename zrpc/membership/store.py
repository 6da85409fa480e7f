"""Membership kept in a torch Store (TCPStore, FileStore, HashStore or what `torchrun` provides).

How a static group starts is in `StaticStart`. In a dynamic one each worker writes one record, under a counter, so that
a look at the counter tells of newcomers. Nobody watches the store: a newcomer is looked for when a name, rank or
incarnation is not known (`refresh`).

Others may write to the store too; see `AuthenticatedStore`. A newcomer refuses to join where it finds what is not the
group's; a member passes over that. A newcomer to a dynamic group cannot tell a run that goes on from one that is over:
where the store was put back to an earlier one, it finds workers that do not answer.

What a look finds is told of in the order in which it was found, by one thread at a time: nobody is told to have left
before it was told to have come.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.errors import RefusedError, RendezvousError
from zrpc.ids import Incarnation, WorkerInfo
from zrpc.membership.authenticated_store import with_secret
from zrpc.membership.claims import LEFT, Claims
from zrpc.membership.group import Member, OnJoined, OnLeft
from zrpc.membership.records import Record
from zrpc.membership.static_start import StaticStart, check_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.membership.claims import HasEnded, Store
    from zrpc.secret import Secret

log = logging.getLogger("zrpc")

ANNOUNCE_WAIT_S = 1.0
"""How long a look waits, at most, for what other threads have found to be told of."""
COUNTER_MAX = 1 << 20
"""So many newcomers to one group are believed."""
COUNT_TRIES = 1 << 12
ABSENT = "-"
"""What no record is: comparing with it reads one that may not be there, without waiting for it."""


class StoreGroup:
    """One worker's membership in the group of a store. `refresh` and `leave` are guarded by a lock.

    Args:
        store: the store, shared by all workers of the group and used for nothing else under these keys.
        has_ended: looks whether another worker has ended; see `Claims`.
        secret: that of the group; None: anybody's records are believed.
    """

    def __init__(
        self, store: Store, has_ended: HasEnded = lambda _address, _life: False, secret: Secret | None = None
    ) -> None:
        self._store = with_secret(store, secret)
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
        self._start: StaticStart | None = None
        self._warned: set[str] = set()
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
                me = Member(WorkerInfo(name, rank), incarnation, card)
                self._start = StaticStart(self._store, me, world_size, timeout_s)
                return me, self._start.join()
            return self._join_dynamic(name, rank, incarnation, card)
        except (RefusedError, RendezvousError):
            raise
        except ValueError as error:  # only of a group without a secret
            raise RefusedError(f"the store of the group holds what no zrpc wrote there: {error}") from error
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
        if self._start is not None:
            self._start.linger(timeout_s)

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        """See `Group.leave`. A static group ends as a whole: there is nothing to say.

        In a dynamic one a goodbye alone makes name and rank free again, so that it is said at exit too.
        """
        del at_exit
        me, self._me = self._me, None
        if me is None or self._claims is None:
            return
        try:
            self._store.set_timeout(timedelta(seconds=timeout_s))
            self._store.set(f"left/{self._index}", LEFT)
            self._claims.release()
        except RuntimeError:
            return  # the store's host is gone: so is the group

    def _join_dynamic(
        self, name: str, rank: int, incarnation: Incarnation, card: dict[str, Any]
    ) -> tuple[Member, list[Member]]:
        check_kind(self._store, "dynamic")
        self._dynamic = True
        claims = Claims(self._store, incarnation, card.get("address") or "", self._has_ended)
        try:
            me = Member(WorkerInfo(name, self._take(claims, name, rank)), incarnation, card)
            others = self._enter(claims, me)
        except RefusedError:
            if self._index:
                self._store.set(f"left/{self._index}", LEFT)
            claims.release()
            raise
        self._claims, self._me = claims, me
        return me, [*others, me]

    def _take(self, claims: Claims, name: str, rank: int) -> int:
        """Claim the name and the rank, which is given out if it is -1; the rank."""
        if not claims.take(f"name/{name}"):
            raise RefusedError(f"worker name {name} is not unique: a worker of this group has it. Choose another name")
        if rank < 0:
            rank = next(free for free in range(1 << 16) if claims.take(f"rank/{free}", from_ended=False))
        elif not claims.take(f"rank/{rank}"):
            raise RefusedError(f"rank {rank} is taken by another worker of this group. Choose another rank")
        return rank

    def _enter(self, claims: Claims, me: Member) -> list[Member]:
        """Write a record, and read those of the others."""
        self._index = self._count_up("members", me.incarnation)
        claims.note_index(self._index)
        self._store.set(f"member/{self._index}", Record(me, 0).pack())
        self._unread = set(range(1, self._index))
        self._count = self._index
        return self._read_newcomers()

    def _count_up(self, key: str, life: Incarnation) -> int:
        """Another number than all before. `add` of a store would do, if others could not have it say anything."""
        found = ""
        for _ in range(COUNT_TRIES):
            expected, number = found, _number(key, found) + 1
            mine = f"{number} {life.hex()}"  # two that count up at once do not write the same
            found = self._store.compare_set(key, expected, mine).decode()
            if found == mine:
                return number
        raise RefusedError(f"the counter {key!r} in the store of this group never stays as it is: others write to it")

    def _read_newcomers(self) -> list[Member]:
        """Those that came since the last look and are still here; one that is still writing its record comes later."""
        with self._passing_over():
            count = _number("members", self._store.compare_set("members", ABSENT, ABSENT).decode())
            self._unread.update(range(self._count + 1, count + 1))
            self._count = max(self._count, count)
        found = []
        for index in sorted(self._unread):
            with self._passing_over():
                if self._store.check([f"left/{index}"]):
                    self._store.get(f"left/{index}")  # others cannot say so
                    self._unread.remove(index)
                elif self._store.check([f"member/{index}"]):
                    member = Record.unpack(self._store.get(f"member/{index}")).member
                    self._unread.remove(index)
                    self._seen[index] = member
                    found.append(member)
        return found

    def _read_departures(self) -> None:
        """Those that are gone since the last look. They are told of first: a newcomer may have the name of one."""
        for index in [index for index in self._seen if self._store.check([f"left/{index}"])]:
            with self._passing_over():
                reason = self._store.get(f"left/{index}").decode()
                self._suspects.discard(index)
                self._find(partial(self._on_left, self._seen.pop(index).incarnation, reason != LEFT, reason))

    @contextlib.contextmanager
    def _passing_over(self) -> Iterator[None]:
        """A newcomer refuses to join where a record is not the group's; a member does without it. Under the lock."""
        try:
            yield
        except RefusedError as error:
            if self._me is None:
                raise
            self._note_foreign(str(error))

    def _note_foreign(self, text: str) -> None:
        """What others wrote is logged, once. Handlers of the log may call: they run without the lock. Under it."""
        if text not in self._warned:
            self._warned.add(text)
            self._find(partial(log.warning, "%s. It is passed over", text))

    def _look_for_suspects(self) -> None:
        """Of those that this worker cannot reach any more, note in the store which have ended."""
        with self._lock:
            members = [self._seen[index] for index in self._suspects if index in self._seen]
            self._suspects.clear()
        for member in members:
            try:
                if self._claims is not None:
                    self._claims.note_ended(member.incarnation, member.card.get("address") or "")
            except RefusedError as error:
                with self._lock:
                    self._note_foreign(str(error))

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


def _number(key: str, found: str) -> int:
    """A counter's number: 0 where there is none yet."""
    if found in ("", ABSENT):
        return 0
    text = found.split(" ")[0]
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(COUNTER_MAX))) or int(text) > COUNTER_MAX:
        raise RefusedError(
            f"the counter {key!r} in the store of this group says {text[:32]!r}, which is no number from 0 to "
            f"{COUNTER_MAX}: others write to it, or the group is to be started anew with a fresh store"
        )
    return int(text)
