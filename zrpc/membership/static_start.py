"""How the workers of a static group find each other in a store.

Each worker writes one record under its rank. Rank 0 makes one roster of them, which all read.

Invariants: all workers of a roster are of one run, also where others have put records of an earlier one, or all of it,
into the store. A record names the life of rank 0 that its worker has met, and rank 0 takes none that names another than
its own; so no record is older than that life. Rank 0 alone makes rosters, and a worker takes none without its own
record; so rank 0 is not older than that worker. No clock is read: those of the workers may differ.

Failure: the first one that finds out why the group cannot be writes that in place of the roster, and all say the same.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING

from zrpc.errors import RefusedError, RendezvousError
from zrpc.membership.records import Failure, Record, pack_roster, unpack_roster

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.membership.counter import Store
    from zrpc.membership.group import Member

POLL_MIN_S = 0.005
POLL_MAX_S = 0.5
LEADER_POLL_MAX_S = 0.05
"""The same for rank 0, which all others wait for."""
POLL_SHARE = 0.1
"""Who waits for the others looks at the store each time that it has waited a tenth longer: a hundred workers that look
at a fixed short interval keep the store from serving those who come."""
FAILED_LINGER_S = 2.0
"""How long a worker of a static group that is not complete in time stays, as the others may learn of it through it."""


class StaticStart:
    """One worker's start. Whoever calls it owns it.

    Args:
        store: of the group.
        me: this worker.
        world_size: how many workers the group has.
        timeout_s: how long to wait for them.
    """

    def __init__(self, store: Store, me: Member, world_size: int, timeout_s: float) -> None:
        self._store = store
        self._me = me
        self._rank = me.info.id
        self._life = me.incarnation.hex()
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._deadline = self._began + timeout_s
        self._num_here = 0  # how many end where the group cannot be

    def join(self) -> list[Member]:
        """Write a record and wait for the roster; all members.

        Raises:
            RefusedError, RendezvousError: see `Group.join`; or a record is not of this run.
            RuntimeError: the store failed.
        """
        self._check_size()
        self._take_rank()
        mine = self._lead() if self._rank == 0 else self._follow()
        return self._read_roster(mine)

    def linger(self, timeout_s: float) -> None:
        """See `Group.linger`. The store may end with this process, and others may not have read who is here."""
        with contextlib.suppress(RuntimeError):  # the store is gone: so are all who had a use for it
            lingering, deadline = self._store.add("lingering", 1), time.monotonic() + timeout_s
            while lingering < self._num_here and time.monotonic() < deadline:
                time.sleep(POLL_MIN_S)  # see `_wait_for`
                lingering = self._store.add("lingering", 0)

    def _check_size(self) -> None:
        first_size = _size(check_kind(self._store, f"static {self._world_size}"))
        if first_size != self._world_size:
            mine = Record(self._me, self._world_size)
            self._store.set("roster", pack_roster([mine.pack()]))  # those who wait are to know at once, too
            _refuse_sizes([mine], first_size)

    def _take_rank(self) -> None:
        if not self._claim(f"rank/{self._rank}", self._life):
            self._store.set(f"twice/{self._rank}", b"1")
            raise RefusedError(
                f"rank {self._rank} is taken by another worker of this group: start each worker with a rank of its "
                "own, and use no file that a group before has left behind"
            )

    def _claim(self, key: str, mine: str) -> bool:
        return self._store.compare_set(key, "", mine).decode() == mine

    def _lead(self) -> bytes:
        """What rank 0 does: its own record, then the roster when all have written theirs."""
        mine = Record(self._me, self._world_size, self._life).pack()
        self._store.set(self._record_key(0), mine)
        keys = self._wait_for(self._record_keys, LEADER_POLL_MAX_S)
        if keys is not None:
            try:
                raw = [self._read_record(other, key) for other, key in enumerate(keys)]
            except RefusedError as error:
                if self._claim("end", "failed"):
                    self._store.set("roster", Failure(str(error), self._world_size).pack())
                    self._num_here = self._world_size
                    self.linger(FAILED_LINGER_S)
                raise
            if self._claim("end", "complete"):  # else another's time was over, and it writes that
                self._store.set("roster", pack_roster(raw))
        return mine

    def _record_key(self, rank: int) -> str:
        """Under which the record of that rank lies, as far as is known now."""
        return f"member/{rank}"

    def _record_keys(self) -> list[str]:
        return [self._record_key(rank) for rank in range(self._world_size)]

    def _read_record(self, rank: int, key: str) -> bytes:
        raw = self._store.get(key)
        if Record.unpack(raw).leader != self._life:
            raise RefusedError(
                f"the record of rank {rank} in the store of this group is of an earlier run: its worker has met "
                "another rank 0. Use a fresh store, which only the workers can reach"
            )
        return raw

    def _follow(self) -> bytes:
        """What the others do: wait for rank 0, as a record says of which life of it the worker knows."""
        if self._wait_for(lambda: ["rank/0"]) is None:
            return b""
        mine = Record(self._me, self._world_size, self._store.get("rank/0").decode()).pack()
        self._store.set(self._record_key(self._rank), mine)
        self._wait_for(_roster)
        return mine

    def _read_roster(self, mine: bytes) -> list[Member]:
        roster = unpack_roster(self._store.get("roster"))
        if isinstance(roster, Failure):
            self._num_here = min(roster.here, self._world_size)
            self.linger(FAILED_LINGER_S)
            raise RendezvousError(roster.why)
        records = [Record.unpack(raw) for raw in roster]
        _refuse_sizes(records, self._world_size)
        if len(roster) != self._world_size or roster[self._rank] != mine:
            raise self._left_out()
        members = [record.member for record in records]
        _check_names(members)
        self._num_here = self._world_size
        return members

    def _left_out(self) -> Exception:
        return RefusedError(
            f"the roster in the store of this group was made without this worker, rank {self._rank}: it is of an "
            "earlier run. Use a fresh store, which only the workers can reach"
        )

    def _look(self) -> None:
        """Each look at the store: raise what ends the wait. Here nothing does but the roster."""

    def _wait_for(self, keys: Callable[[], list[str]], pause_max_s: float = POLL_MAX_S) -> list[str] | None:
        """Wait until `keys()` are there, and return them; None: the roster is there before, and says why they are not.

        One is looked for at a time, so that it costs the store no more to wait for both.

        The first one whose time is over writes in place of the roster why there is none: a group that lacks it cannot
        be either, and all are to say the same.
        """
        for look_for in itertools.cycle((keys, _roster)):
            found = look_for()
            if self._store.check(found):
                return found if look_for is keys else None
            self._look()
            now = time.monotonic()
            if now > self._deadline and self._claim("end", "failed"):
                self._store.set("roster", self._why_incomplete().pack())
                return None
            if now > self._deadline + FAILED_LINGER_S:
                raise RendezvousError("all workers came, but rank 0 died before it could tell the rest")
            # A Store offers no event that a FileStore and a TCPStore both have.
            time.sleep(min(max(POLL_MIN_S, (now - self._began) * POLL_SHARE), pause_max_s))
        raise AssertionError("a cycle does not end")

    def _why_incomplete(self) -> Failure:
        absent = self._without(lambda rank: f"rank/{rank}")
        silent = absent or self._without(self._record_key)
        twice = [str(rank) for rank in range(self._world_size) if self._store.check([f"twice/{rank}"])]
        again = f"; two workers were started with rank {' and with rank '.join(twice)}" if twice else ""
        return Failure(
            f"rank(s) {', '.join(silent) or 'none (rank 0 died at once)'} did not join within {self._timeout_s:g} s"
            f"{again}: check that they were started, with the same init_method, world_size and secret",
            self._world_size - len(absent),
        )

    def _without(self, key_of: Callable[[int], str]) -> list[str]:
        return [str(rank) for rank in range(self._world_size) if not self._store.check([key_of(rank)])]


def _roster() -> list[str]:
    return ["roster"]


def check_kind(store: Store, mine: str) -> str:
    """Whoever comes first says whether the group is `static SIZE` or `dynamic`; what it said.

    Raises:
        RefusedError: the group is of another kind than `mine`.
    """
    theirs = store.compare_set("kind", "", mine).decode()
    kind = theirs.split(" ")[0]
    if kind != mine.split(" ")[0]:
        raise RefusedError(
            "RPC group mixes statically and dynamically initialized members which is not supported. "
            f"This group is {kind[:32]}: start this worker {'with' if kind == 'static' else 'without'} world_size, "
            "as the others were"
        )
    return theirs


def _size(kind: str) -> int:
    size = kind.partition(" ")[2]
    if not (size.isascii() and size.isdigit() and len(size) < 10):
        raise RefusedError(
            f"the record 'kind' in the store of this group says {kind[:32]!r}, and no size: it was written by another "
            "version of zrpc, or by no worker"
        )
    return int(size)


def _refuse_sizes(records: list[Record], world_size: int) -> None:
    """Raise if a worker was started with another size than `world_size`."""
    for record in records:
        if record.world_size != world_size:
            raise RefusedError(
                f"{record.member.info} was started with world_size={record.world_size} and others with "
                f"world_size={world_size}: start all workers with the same"
            )


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
