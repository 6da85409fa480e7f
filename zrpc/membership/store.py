"""Membership kept in a torch Store (TCPStore, FileStore, HashStore or what `torchrun` provides).

How a static group starts is in `StaticStart`, and under torchrun in `ElasticStart`. In a dynamic one each worker writes
one record, under a counter, so that a look at the counter tells of newcomers; another counter tells of those that left
or died. A thread looks at both every `LOOK_INTERVAL_S`, and a newcomer is looked for at once when a name, rank or
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

from zrpc import threads
from zrpc.errors import LimitError, RefusedError, RendezvousError
from zrpc.ids import Incarnation, WorkerInfo
from zrpc.membership.authenticated_store import with_secret
from zrpc.membership.claims import LEFT, Claims, note_left
from zrpc.membership.counter import Counter
from zrpc.membership.elastic_start import ElasticStart, is_started_by_torchrun
from zrpc.membership.group import Member, OnJoined, OnLeft
from zrpc.membership.records import Record
from zrpc.membership.static_start import StaticStart, check_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.membership.claims import HasEnded
    from zrpc.membership.counter import Store
    from zrpc.secret import Secret

log = logging.getLogger("zrpc")

ANNOUNCE_WAIT_S = 1.0
"""How long a look waits, at most, for what other threads have found to be told of."""
LOOK_INTERVAL_S = 0.25
"""How often the counters are looked at: two small requests to the store."""
LOOKER_END_S = 1.0
"""How long a worker that leaves waits for the thread that looks: it may wait for a worker that does not answer."""


class StoreGroup:
    """One worker's membership in the group of a store. `refresh` and `leave` are guarded by a lock.

    Args:
        store: the store, shared by all workers of the group and used for nothing else under these keys.
        has_ended: looks whether another worker has ended; see `Claims`.
        secret: that of the group; None: anybody's records are believed.
        look_interval_s: how often to look for who came or left a dynamic group; None: in `refresh` only.
    """

    def __init__(
        self,
        store: Store,
        has_ended: HasEnded = lambda _address, _life: False,
        secret: Secret | None = None,
        look_interval_s: float | None = LOOK_INTERVAL_S,
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
        self._suspects: deque[Incarnation] = deque()  # no lock: who adds to it must not wait for the store
        self._claims: Claims | None = None
        self._unread: set[int] = set()
        self._comings = Counter(self._store, "members")
        self._departures = Counter(self._store, "departures")
        self._num_came = self._num_departed = 0
        self._look_interval_s = look_interval_s
        self._has_left = threading.Event()
        self._looker: threading.Thread | None = None
        self._start: StaticStart | ElasticStart | None = None
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
                kind = ElasticStart if is_started_by_torchrun() else StaticStart
                self._start = kind(self._store, me, world_size, timeout_s)
                return me, self._start.join()
            return self._join_dynamic(name, rank, incarnation, card)
        except (RefusedError, RendezvousError, LimitError):
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
            self._read()
            if self._look_for_suspects():
                self._read()
        except RuntimeError as error:
            raise RendezvousError(f"the store of the group failed: {error}. Check that its host is up") from error

    def _read(self) -> None:
        """Tell of all that the store says by now."""
        with self._lock:
            self._read_departures()
            for member in self._read_newcomers():
                self._find(partial(self._on_joined, member))
        self._tell()

    def note_lost(self, incarnation: Incarnation) -> None:
        """See `Group.note_lost`: the next `refresh` looks whether it has ended."""
        self._suspects.append(incarnation)

    def linger(self, timeout_s: float) -> None:
        """See `Group.linger`. The store may end with this process, and others may not have read who is here."""
        if self._start is not None:
            self._start.linger(timeout_s)

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        """See `Group.leave`. A static group ends as a whole: there is nothing to say.

        In a dynamic one a goodbye alone makes name and rank free again, so that it is said at exit too.
        """
        del at_exit
        self._has_left.set()
        if self._looker not in (None, threading.current_thread()):
            threads.join(self._looker, LOOKER_END_S)
        me, self._me = self._me, None
        if me is None or self._claims is None:
            return
        try:
            self._store.set_timeout(timedelta(seconds=timeout_s))
            self._note_left(me.incarnation)
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
            if self._look_interval_s is not None:
                self._looker = threads.start(self._look_on, "zrpc-membership")  # it waits for an interval first
        except (RefusedError, LimitError):
            if self._index:
                self._note_left(incarnation)
            claims.release()
            raise
        self._claims, self._me = claims, me
        return me, [*others, me]

    def _note_left(self, me: Incarnation) -> None:
        note_left(self._store, self._index, LEFT, me)

    def _look_on(self) -> None:
        """Look at the store until this worker leaves. Where the store's host is gone, nothing can be seen any more."""
        while not self._has_left.wait(self._look_interval_s):
            try:
                if self._has_news():
                    self.refresh()
            except RuntimeError as error:
                log.info("newcomers are not seen any more, as the store of the group failed: %s", error)
                return

    def _has_news(self) -> bool:
        with self._lock:
            if self._suspects or self._unread:
                return True
            with self._passing_over():
                if self._comings.read() > self._num_came:
                    return True
            with self._passing_over():
                return self._departures.read() > self._num_departed
            return False

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
        self._index = self._comings.next(me.incarnation)
        claims.note_index(self._index)
        self._store.set(f"member/{self._index}", Record(me, 0).pack())
        self._unread = set(range(1, self._index))
        self._num_came = self._index
        return self._read_newcomers()

    def _read_newcomers(self) -> list[Member]:
        """Those that came since the last look and are still here; one that is still writing its record comes later."""
        with self._passing_over():
            count = self._comings.read()
            self._unread.update(range(self._num_came + 1, count + 1))
            self._num_came = max(self._num_came, count)
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
        with self._passing_over():
            self._num_departed = self._departures.read()  # before: who leaves meanwhile is news
        for index in [index for index in self._seen if self._store.check([f"left/{index}"])]:
            with self._passing_over():
                reason = self._store.get(f"left/{index}").decode()
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

    def _look_for_suspects(self) -> bool:
        """Of those that this worker cannot reach any more, note in the store which have ended; whether any has."""
        lost = {self._suspects.popleft() for _ in range(len(self._suspects))}
        with self._lock:
            members = [member for member in self._seen.values() if member.incarnation in lost]
        found = False
        for member in members:
            try:
                if self._claims is not None:
                    found |= self._claims.note_ended(member.incarnation, member.card.get("address") or "")
            except RefusedError as error:
                with self._lock:
                    self._note_foreign(str(error))
        return found

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
