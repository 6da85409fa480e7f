"""How the workers of a static group find each other where torchrun starts them again and again over one store.

What: torchrun starts its workers in *rounds*, and tells them which round it is by no number that all nodes share: the
count of restarts (`TORCHELASTIC_RESTART_COUNT`) is each node's own. So a round is that of a life of rank 0. Each worker
writes its life under its rank as it comes, in place of the one before. Rank 0 leads the round that is called after its
life; the others take part in that of the rank 0 which the store names, and change to another one as soon as it names
another. In a round they meet as in any static group (`StaticStart`).

Invariants: torchrun waits until the workers of a node have ended before the node takes part in the next round. So the
life that the store names under a rank is the newest one. What an earlier one wrote is passed over: a roster that was
there before, a record of a life that is not the newest of its rank.

Failure: a process of an earlier round that still waits here, since its node was lost, finds that another life has its
rank, or that torchrun, which started it, is gone. It raises, and is in no later round. Where such processes complete a
round before the newer ones have come, that round ends as one that loses workers, and torchrun begins the next.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from zrpc.errors import RendezvousError
from zrpc.membership.counter import ABSENT
from zrpc.membership.records import Record
from zrpc.membership.static_start import POLL_MAX_S, POLL_MIN_S, POLL_SHARE, StaticStart

if TYPE_CHECKING:
    from zrpc.membership.counter import Store
    from zrpc.membership.group import Member

COUNT_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
"""torchrun sets it in the environment of its workers."""


def is_started_by_torchrun() -> bool:
    """Whether torchrun started this process, and may start another one in its place."""
    return COUNT_VARIABLE in os.environ


class ElasticStart:
    """One worker's start. Whoever calls it owns it. See `StaticStart`."""

    def __init__(self, store: Store, me: Member, world_size: int, timeout_s: float) -> None:
        self._store = store
        self._me = me
        self._rank = me.info.id
        self._life = me.incarnation.hex()
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._parent = os.getppid()
        self._round: _Round | None = None

    def join(self) -> list[Member]:
        """Come, and take part in rounds until one is complete; all members. See `StaticStart.join`."""
        self._store.set(f"rank/{self._rank}", self._life)
        leader = ""
        while True:
            leader = self._leader_after(leader)
            self._round = _Round(self, self._store, leader, self._me, self._world_size, self._timeout_s, self._began)
            try:
                return self._round.join()
            except _RoundOverError:
                continue

    def linger(self, timeout_s: float) -> None:
        """See `Group.linger`."""
        if self._round is not None:
            self._round.linger(timeout_s)

    def newest(self, rank: int) -> str:
        """The life that came last under `rank`; empty: none."""
        found = self._store.compare_set(f"rank/{rank}", ABSENT, ABSENT).decode()
        return "" if found == ABSENT else found

    def check(self) -> None:
        """Raise if this process is one of an earlier round.

        Raises:
            RendezvousError: it is.
        """
        if self.newest(self._rank) != self._life:
            raise RendezvousError(
                f"another process has taken the place of this worker, rank {self._rank}: torchrun has begun its next "
                "round, and this process is of an earlier one"
            )
        if os.getppid() != self._parent:
            raise RendezvousError(f"torchrun, which started this worker, rank {self._rank}, has ended")

    def _leader_after(self, earlier: str) -> str:
        """The life of a rank 0 that is not `earlier`, whose round is over; waits for it."""
        while (leader := self.newest(0)) in ("", earlier):
            self.check()
            waited_s = time.monotonic() - self._began
            if waited_s > self._timeout_s:
                raise RendezvousError(
                    f"rank(s) 0 did not join within {self._timeout_s:g} s: check that it was started, with the same "
                    "init_method, world_size and secret"
                )
            time.sleep(min(max(POLL_MIN_S, waited_s * POLL_SHARE), POLL_MAX_S))
        return leader


class _RoundOverError(Exception):
    """The round can not become this worker's: the next rank 0 is here, or is to come."""


class _Round(StaticStart):
    """One worker's part in the round of one life of rank 0."""

    def __init__(
        self, rounds: ElasticStart, store: Store, leader: str, me: Member, world_size: int, timeout_s: float,
        began: float,
    ) -> None:  # fmt: skip
        super().__init__(_Prefixed(store, f"round/{leader}/"), me, world_size, timeout_s)
        self._rounds = rounds
        self._leader = leader
        self._began = began
        self._deadline = began + timeout_s

    def _take_rank(self) -> None:
        self._store.set(f"rank/{self._rank}", self._life)

    def _follow(self) -> bytes:
        if self._store.check(["roster"]):  # it was complete before this worker came, or failed
            raise _RoundOverError
        mine = Record(self._me, self._world_size, self._leader).pack()
        self._store.set(f"member/{self._rank}/{self._life}", mine)
        self._wait_for(lambda: ["roster"])
        self._look()
        return mine

    def _left_out(self) -> Exception:
        return _RoundOverError()

    def _look(self) -> None:
        self._rounds.check()
        if self._rounds.newest(0) != self._leader:
            raise _RoundOverError

    def _record_key(self, rank: int) -> str:
        """That of the newest life of the rank: an earlier one that still waits may write, too."""
        return f"member/{rank}/{self._rounds.newest(rank)}"


class _Prefixed:
    """The keys of `store` that begin with `prefix`, without it."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def set(self, key: str, value: str | bytes, /) -> None:
        self._store.set(self._prefix + key, value)

    def get(self, key: str, /) -> bytes:
        return self._store.get(self._prefix + key)

    def add(self, key: str, amount: int, /) -> int:
        return self._store.add(self._prefix + key, amount)

    def check(self, keys: list[str], /) -> bool:
        return self._store.check([self._prefix + key for key in keys])

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        return self._store.compare_set(self._prefix + key, expected, desired)
