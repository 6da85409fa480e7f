"""Workers that torchrun starts again meet over the store of the rounds before, whatever their nodes count."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import pytest
import torch.distributed as dist

from tests.waiting import until
from zrpc.errors import RendezvousError
from zrpc.ids import WorkerInfo, new_incarnation
from zrpc.membership.elastic_start import ElasticStart
from zrpc.membership.group import Member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zrpc.membership.counter import Store

SIZE = 3
WAIT_S = 20.0


@pytest.fixture(params=["hash", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made = dist.HashStore() if request.param == "hash" else dist.FileStore(str(tmp_path / "store"), -1)
    made.set_timeout(timedelta(seconds=WAIT_S))
    return cast("Store", made)


class Round:
    """Workers of one round; each comes on a thread of its own."""

    def __init__(self, store: Store, pool: ThreadPoolExecutor, timeout_s: float = WAIT_S) -> None:
        self._store = store
        self._pool = pool
        self._timeout_s = timeout_s
        self.lives = [new_incarnation() for _ in range(SIZE)]
        self._coming: dict[int, Future[list[Member]]] = {}

    def come(self, *ranks: int) -> None:
        """These workers come, and are seen in the store."""
        for rank in ranks:
            member = Member(WorkerInfo(f"worker{rank}", rank), self.lives[rank], {})
            start = ElasticStart(self._store, member, SIZE, self._timeout_s)
            self._coming[rank] = self._pool.submit(start.join)
            until(lambda rank=rank: self.is_seen(rank), f"rank {rank} came")  # type: ignore[misc]

    def is_seen(self, rank: int) -> bool:
        key = f"rank/{rank}"
        return self._store.check([key]) and self._store.get(key).decode() == self.lives[rank].hex()

    def takes_part(self, rank: int, leader: Round) -> None:
        """Wait until that worker has written its record for the rank 0 of that round."""
        key = f"round/{leader.lives[0].hex()}/member/{rank}/{self.lives[rank].hex()}"
        until(lambda: self._store.check([key]), f"rank {rank} takes part")

    def met(self, rank: int) -> list[bytes]:
        """With whom that worker met."""
        return [member.incarnation for member in self._coming[rank].result(WAIT_S)]

    def error(self, rank: int) -> str:
        """Why that worker met with none."""
        with pytest.raises(RendezvousError) as caught:
            self._coming[rank].result(WAIT_S)
        return str(caught.value)

    def all_met(self) -> bool:
        return all(self.met(rank) == self.lives for rank in range(SIZE))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4 * SIZE) as made:
        yield made


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_rounds_meet_one_after_the_other_in_whatever_order_they_come(
    store: Store, pool: ThreadPoolExecutor, order: tuple[int, ...]
) -> None:
    """Those that come before their rank 0 find the roster of the round before, and pass over it."""
    for _ in range(3):
        one = Round(store, pool)
        one.come(*order)
        assert one.all_met()


@pytest.mark.parametrize(
    ("came", "order"), [((0,), (0, 1, 2)), ((1,), (0, 1, 2)), ((1,), (2, 1, 0)), ((0, 1), (0, 1, 2))]
)
def test_a_round_meets_after_one_that_was_never_complete(
    store: Store, pool: ThreadPoolExecutor, came: tuple[int, ...], order: tuple[int, ...]
) -> None:
    """Processes of the earlier one that still wait are told that they are of an earlier one; they are in no later."""
    earlier, one = Round(store, pool), Round(store, pool)
    earlier.come(*came)
    one.come(*order)
    assert one.all_met()
    for rank in came:
        assert "has taken the place of this worker" in earlier.error(rank)


def test_a_worker_that_is_started_again_alone_takes_the_place_of_its_record(
    store: Store, pool: ThreadPoolExecutor
) -> None:
    """Its rank 0 waits on, and counts the newest life of each rank."""
    one, again = Round(store, pool), Round(store, pool)
    one.come(0, 1)
    one.takes_part(1, one)
    again.lives[1] = new_incarnation()
    again.come(1)
    again.takes_part(1, one)
    one.come(2)
    expected = [one.lives[0], again.lives[1], one.lives[2]]
    assert one.met(0) == one.met(2) == again.met(1) == expected
    assert "has taken the place" in one.error(1)


def test_who_does_not_come_is_named(store: Store, pool: ThreadPoolExecutor) -> None:
    """By rank 0 and by the others; by those alone if it is rank 0, also where the one of an earlier round came."""
    one = Round(store, pool, timeout_s=0.5)
    one.come(0, 2)
    assert "rank(s) 1 did not join within 0.5 s" in one.error(0)
    assert "rank(s) 1 did not join within 0.5 s" in one.error(2)
    late = Round(store, pool, timeout_s=0.5)
    late.come(1, 2)
    assert "rank(s) 0 did not join within 0.5 s" in late.error(1)
    assert "rank(s) 0 did not join within 0.5 s" in late.error(2)


def test_a_worker_whose_torchrun_is_gone_waits_no_longer(
    store: Store, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no later round, if there is one."""
    one = Round(store, pool)
    one.come(0, 1)
    one.takes_part(1, one)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert "torchrun, which started this worker, rank 0, has ended" in one.error(0)
    assert "torchrun, which started this worker, rank 1, has ended" in one.error(1)
