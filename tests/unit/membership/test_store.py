"""Membership in a store: static groups that wait for all, dynamic ones that come and go."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch.distributed as dist

from tests.waiting import until
from zrpc.errors import RefusedError, RendezvousError
from zrpc.ids import Incarnation, WorkerInfo, new_incarnation
from zrpc.membership.group import Member
from zrpc.membership.records import Record
from zrpc.membership.store import StoreGroup

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from zrpc.membership.counter import Store

WAIT_S = 20.0


@pytest.fixture(params=["hash", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made = dist.HashStore() if request.param == "hash" else dist.FileStore(str(tmp_path / "store"), -1)
    made.set_timeout(timedelta(seconds=WAIT_S))
    return cast("Store", made)


class Seat:
    """One worker's membership, and what it was told."""

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        ended: Container[Incarnation] = (),
        look_interval_s: float | None = None,
    ) -> None:
        self.info = WorkerInfo(name, max(rank, 0))
        self.rank = rank
        self.incarnation = new_incarnation()
        self.group = StoreGroup(store, lambda _, incarnation: incarnation in ended, None, look_interval_s)
        self.joined: list[Member] = []
        self.left: list[tuple[Incarnation, bool, str]] = []
        self.told: list[str] = []
        self.group.watch(self._on_joined, self._on_left)

    def _on_joined(self, member: Member) -> None:
        self.joined.append(member)
        self.told.append(f"+{member.info.name}")

    def _on_left(self, incarnation: Incarnation, lost: bool, reason: str) -> None:
        self.left.append((incarnation, lost, reason))
        self.told.append("-")

    def join(
        self, world_size: int | None, timeout_s: float = WAIT_S, card: dict[str, Any] | None = None
    ) -> tuple[Member, list[Member]]:
        return self.group.join(self.info.name, self.rank, world_size, self.incarnation, card or {}, timeout_s)


def join_all(seats: list[Seat], *sizes: int | None, timeout_s: float = WAIT_S) -> list[Any]:
    """What each seat's `join` gave, or raised."""

    def join(seat: Seat, size: int | None) -> Any:
        try:
            return seat.join(size, timeout_s)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(seats)) as pool:
        return list(pool.map(join, seats, sizes if len(sizes) > 1 else sizes * len(seats)))


# ---- static groups -----------------------------------------------------------------------------------------------


def test_a_static_group_is_there_when_all_are(store: Store) -> None:
    seats = [Seat(store, name, rank) for rank, name in enumerate("abc")]
    for seat, (me, members) in zip(seats, join_all(seats, 3), strict=True):
        assert me.info == seat.info
        assert me.incarnation == seat.incarnation
        assert [member.info for member in members] == [seat.info for seat in seats]
        assert [member.incarnation for member in members] == [seat.incarnation for seat in seats]
        seat.group.refresh()
        seat.group.leave(1.0)
        assert seat.told == [], "nobody comes to a static group, and it ends as a whole"


def test_cards_are_handed_on() -> None:
    store = cast("Store", dist.HashStore())
    card = {"address": "tcp://127.0.0.1:5", "devices": ["cuda:0"], "n": 1, "raw": b"\x00"}
    me, members = Seat(store, "a", 0).join(1, card=card)
    assert me.card == members[0].card == card


def test_who_does_not_come_is_named(store: Store) -> None:
    seats = [Seat(store, "a", 0), Seat(store, "c", 2)]
    for error in join_all(seats, 4, timeout_s=0.05):
        assert isinstance(error, RendezvousError)
        assert "rank(s) 1, 3 did not join within 0.05 s" in str(error)


def test_one_name_for_two_ranks_is_refused_to_all(store: Store) -> None:
    for error in join_all([Seat(store, "a", 0), Seat(store, "b", 1), Seat(store, "a", 2)], 3):
        assert isinstance(error, RefusedError)
        assert "worker name a is not unique: ranks 0 and 2 both have it" in str(error)


def test_one_rank_for_two_is_refused_to_the_second(store: Store) -> None:
    first, second, third = Seat(store, "a", 0), Seat(store, "b", 1), Seat(store, "c", 0)
    results = join_all([first, second], 2)
    assert all(isinstance(result, tuple) for result in results)
    with pytest.raises(RefusedError, match="rank 0 is taken by another worker"):
        third.join(2)


def test_different_world_sizes_are_refused(store: Store) -> None:
    results = join_all([Seat(store, "a", 0), Seat(store, "b", 1), Seat(store, "c", 2)], 3, 2, 3)
    refusals = [str(result) for result in results if isinstance(result, RefusedError)]
    assert len(refusals) >= 2
    assert all("start all workers with the same" in text for text in refusals)
    assert any("world_size=3" in text and "world_size=2" in text for text in refusals)


class CountingStore:
    """A store that counts what is read from it, over all of its users."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self._lock = threading.Lock()
        self.gets = 0

    def get(self, key: str) -> bytes:
        with self._lock:
            self.gets += 1
        return cast("bytes", self._store.get(key))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_large_group_does_not_read_each_record_for_each_worker() -> None:
    count = 24
    store = CountingStore()
    results = join_all([Seat(store, f"w{rank}", rank) for rank in range(count)], count)
    assert [len(members) for _, members in results] == [count] * count
    assert store.gets == 3 * count - 1, "rank 0 reads all records, everybody one roster, and all others who is rank 0"


def test_a_rank_0_that_dies_before_it_made_the_roster_is_named(store: Store) -> None:
    store.compare_set("rank/0", "", new_incarnation().hex())
    store.set("member/0", b"of a dead worker")
    with pytest.raises(RendezvousError, match=r"rank\(s\) none \(rank 0 died at once\) did not join"):
        Seat(store, "b", 1).join(2, timeout_s=0.05)


def test_a_rank_0_that_does_not_come_is_named_alone(store: Store) -> None:
    """The others have written no record yet, as they wait for it; they are not said to be missing."""
    for error in join_all([Seat(store, "b", 1), Seat(store, "c", 2)], 3, timeout_s=0.05):
        assert isinstance(error, RendezvousError)
        assert "rank(s) 0 did not join within 0.05 s" in str(error)


def test_a_rank_0_that_comes_last_completes_the_group(store: Store) -> None:
    """The others wait for it before they write their records."""
    first, last = Seat(store, "b", 1), Seat(store, "a", 0)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(first.join, 2)
        while not store.check(["rank/1"]):
            threading.Event().wait(0.001)
        _, members = last.join(2)
        assert joining.result(WAIT_S)[1] == members


def test_static_and_dynamic_members_do_not_mix(store: Store) -> None:
    Seat(store, "a", 0).join(1)
    with pytest.raises(RefusedError, match=r"mixes statically and dynamically .* start this worker with world_size"):
        Seat(store, "b", 1).join(None)


# ---- dynamic groups ----------------------------------------------------------------------------------------------


def test_a_dynamic_group_grows_and_shrinks(store: Store) -> None:
    a, b, c = (Seat(store, name, rank) for rank, name in enumerate("abc"))
    _, members = a.join(None)
    assert [member.info.name for member in members] == ["a"]
    _, members = b.join(None)
    assert [member.info.name for member in members] == ["a", "b"]
    a.group.refresh()
    assert a.told == ["+b"]
    b.group.leave(1.0)
    b.group.leave(1.0)
    _, members = c.join(None)
    assert [member.info.name for member in members] == ["a", "c"]
    a.group.refresh()
    assert a.told == ["+b", "-", "+c"]
    assert a.left == [(b.incarnation, False, "it left the group")]
    c.group.refresh()
    a.group.refresh()
    assert c.told == []
    assert len(a.told) == 3


def test_ranks_are_given_out_and_used_again(store: Store) -> None:
    seats = [Seat(store, name, -1) for name in "abc"]
    ranks = [seat.join(None)[0].info.id for seat in seats]
    assert ranks == [0, 1, 2]
    seats[1].group.leave(1.0)
    assert Seat(store, "d", -1).join(None)[0].info.id == 1


def test_names_and_ranks_that_are_taken_are_refused_until_they_are_given_up(store: Store) -> None:
    first = Seat(store, "a", 0)
    first.join(None)
    with pytest.raises(RefusedError, match="worker name a is not unique"):
        Seat(store, "a", 1).join(None)
    with pytest.raises(RefusedError, match="rank 0 is taken"):
        Seat(store, "b", 0).join(None)
    other = Seat(store, "b", 1)
    other.join(None)  # the refused attempt gave the name up
    first.group.leave(1.0)
    again = Seat(store, "a", 0)
    _, members = again.join(None)
    assert {member.incarnation for member in members} == {other.incarnation, again.incarnation}


def test_a_name_that_is_used_again_is_told_as_gone_first(store: Store) -> None:
    a, b = Seat(store, "a", 0), Seat(store, "b", 1)
    a.join(None)
    b.join(None)
    a.group.refresh()
    b.group.leave(1.0)
    again = Seat(store, "b", 1)
    again.join(None)
    a.group.refresh()
    assert a.told == ["+b", "-", "+b"]
    assert [member.incarnation for member in a.joined] == [b.incarnation, again.incarnation]


def test_one_who_came_and_left_between_two_looks_is_not_told_of(store: Store) -> None:
    a, b = Seat(store, "a", 0), Seat(store, "b", 1)
    a.join(None)
    b.join(None)
    b.group.leave(1.0)
    a.group.refresh()
    assert a.told == []


def test_one_who_is_still_writing_its_record_does_not_hold_anybody_up(store: Store) -> None:
    a, b = Seat(store, "a", 0), Seat(store, "b", 1)
    a.join(None)
    store.set("members", "2 of another")  # another worker has taken a number, and no more
    _, members = b.join(None)
    assert [member.info.name for member in members] == ["a", "b"]
    a.group.refresh()
    assert a.told == ["+b"]
    late = Seat(store, "late", 5)
    store.set("member/2", Record(Member(late.info, late.incarnation, {}), 0).pack())
    for seat in (a, b):
        seat.group.refresh()
        assert seat.told[-1] == "+late"


def test_many_come_at_once_and_all_get_to_know_each_other(store: Store) -> None:
    count = 8
    seats = [Seat(store, f"w{number}", -1) for number in range(count)]
    results = join_all(seats, None)
    assert sorted(me.info.id for me, _ in results) == list(range(count))
    for seat, (_, members) in zip(seats, results, strict=True):
        seat.group.refresh()
        known = [member.info.name for member in [*members, *seat.joined]]
        assert sorted(known) == sorted(other.info.name for other in seats), "each of them once"


def test_threads_may_look_at_once(store: Store) -> None:
    a = Seat(store, "a", 0)
    a.join(None)
    for number in range(5):
        Seat(store, f"w{number}", -1).join(None)
    threads = [threading.Thread(target=a.group.refresh) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a.told) == [f"+w{number}" for number in range(5)]


# ---- deaths ------------------------------------------------------------------------------------------------------


def test_name_and_rank_of_one_that_died_are_taken_and_the_others_learn_of_it(store: Store) -> None:
    """They are told that it is lost, then that the newcomer is there; what the dead one held alone is free too."""
    ended: set[Incarnation] = set()
    a, b = Seat(store, "a", 0, ended), Seat(store, "b", 1, ended)
    a.join(None)
    b.join(None)
    a.group.refresh()
    with pytest.raises(RefusedError, match="worker name b is not unique"):
        Seat(store, "b", 1, ended).join(None)
    with pytest.raises(RefusedError, match="rank 1 is taken"):
        Seat(store, "c", 1, ended).join(None)
    ended.add(b.incarnation)
    again = Seat(store, "b", 1, ended)
    _, members = again.join(None)
    assert {member.incarnation for member in members} == {a.incarnation, again.incarnation}
    a.group.refresh()
    assert a.told == ["+b", "-", "+b"]
    ((life, is_lost, reason),) = a.left
    assert (life, is_lost) == (b.incarnation, True)
    assert "it died without leaving the group" in reason
    b.group.leave(1.0)
    with pytest.raises(RefusedError, match="worker name b is not unique"):
        Seat(store, "b", 1, ended).join(None)


def test_only_one_of_many_gets_the_name_of_one_that_died(store: Store) -> None:
    """All others are refused: the name has a living holder again."""
    ended: set[Incarnation] = set()
    first = Seat(store, "guest", 0, ended)
    first.join(None)
    ended.add(first.incarnation)
    results = join_all([Seat(store, "guest", -1, ended) for _ in range(8)], None)
    assert sum(isinstance(result, tuple) for result in results) == 1
    assert sum(isinstance(result, RefusedError) for result in results) == 7


def test_one_that_cannot_be_reached_is_gone_for_newcomers_if_it_has_ended(store: Store) -> None:
    """Whoever lost it looks, and notes it for all; one that lives stays."""
    ended: set[Incarnation] = set()
    a, b, c = (Seat(store, name, rank, ended) for rank, name in enumerate("abc"))
    for seat in (a, b, c):
        seat.join(None)
    a.group.refresh()
    ended.add(b.incarnation)
    a.group.note_lost(b.incarnation)
    a.group.note_lost(c.incarnation)
    a.group.refresh()
    _, members = Seat(store, "d", 3, ended).join(None)
    assert [member.info.name for member in members] == ["a", "c", "d"]


def test_nobody_is_told_to_have_left_before_it_was_told_to_have_come(store: Store) -> None:
    """Two threads look: one is telling of a newcomer when the other finds that it has left."""
    a = Seat(store, "a", 0)
    a.join(None)
    telling, go_on = threading.Event(), threading.Event()
    told: list[str] = []

    def on_joined(member: Member) -> None:
        telling.set()
        assert go_on.wait(WAIT_S)
        told.append(f"+{member.info.name}")

    a.group.watch(on_joined, lambda *_: told.append("-"))
    b = Seat(store, "b", 1)
    b.join(None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(a.group.refresh)
        assert telling.wait(WAIT_S)
        b.group.leave(1.0)
        second = pool.submit(a.group.refresh)
        while not second.done() and store.check(["left/2"]) and not go_on.is_set():
            go_on.set()
        first.result(WAIT_S)
        second.result(WAIT_S)
    assert told == ["+b", "-"]


# ---- stores that fail --------------------------------------------------------------------------------------------


def test_a_look_does_not_end_before_what_another_has_found_is_told_of() -> None:
    store = cast("Store", dist.HashStore())
    here, there = Seat(store, "a", 0), Seat(store, "b", 1)
    here.join(None)
    telling, go_on = threading.Event(), threading.Event()
    told: list[str] = []

    def on_joined(member: Member) -> None:
        telling.set()
        assert go_on.wait(WAIT_S)
        told.append(member.info.name)

    here.group.watch(on_joined, here._on_left)
    there.join(None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(here.group.refresh)
        assert telling.wait(WAIT_S)
        second = pool.submit(lambda: (here.group.refresh(), list(told))[1])
        go_on.set()
        assert second.result(WAIT_S) == ["b"]
        first.result(WAIT_S)


class BrokenStore:
    """A store whose host is gone, once it is broken."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        def use(*arguments: object) -> Any:
            if self.broken:
                raise RuntimeError("Broken pipe")
            return getattr(self._store, name)(*arguments)

        return use


def broken_store() -> BrokenStore:
    """One that is broken already."""
    store = BrokenStore()
    store.broken = True
    return store


@pytest.mark.parametrize("world_size", [2, None])
def test_a_store_that_fails_is_named_as_the_cause(world_size: int | None) -> None:
    with pytest.raises(RendezvousError, match=r"the store failed while 'a' joined: Broken pipe"):
        Seat(broken_store(), "a", 0).join(world_size)


def test_a_store_that_fails_later_is_told_by_a_look_and_not_by_a_goodbye() -> None:
    store = BrokenStore()
    seat = Seat(store, "a", 0)
    seat.join(None)
    store.broken = True
    with pytest.raises(RendezvousError, match="the store of the group failed: Broken pipe"):
        seat.group.refresh()
    seat.group.leave(1.0)


def test_leaving_before_joining_is_nothing() -> None:
    StoreGroup(broken_store()).leave(1.0)
    StoreGroup(broken_store()).refresh()


def test_who_ends_at_once_waits_until_the_others_do() -> None:
    shared = cast("Store", dist.HashStore())
    seats = [Seat(shared, name, rank) for rank, name in enumerate("ab")]
    join_all(seats, 2, 2)
    first = threading.Thread(target=seats[0].group.linger, args=(WAIT_S,))
    first.start()
    first.join(0.05)
    assert first.is_alive()
    seats[1].group.linger(WAIT_S)
    first.join(WAIT_S)
    assert not first.is_alive()


def test_nobody_waits_for_ever_for_others_to_end() -> None:
    shared = cast("Store", dist.HashStore())
    seats = [Seat(shared, name, rank) for rank, name in enumerate("ab")]
    join_all(seats, 2, 2)
    seats[0].group.linger(0.01)
    assert shared.add("lingering", 0) == 1


def test_comings_and_goings_are_seen_without_a_look(store: Store) -> None:
    """A member of a dynamic group learns of who came, left or died though it asks for no one."""
    ended: set[Incarnation] = set()
    first = Seat(store, "first", 0, ended, look_interval_s=0.01)
    leaver, dead, second = (Seat(store, name, rank, ended) for rank, name in enumerate(("leaver", "dead", "dead"), 1))
    second.rank = 2
    first.join(None)
    leaver.join(None)
    dead.join(None)
    until(lambda: {seat.incarnation for seat in (leaver, dead)} <= {one.incarnation for one in first.joined}, "joined")
    leaver.group.leave(1.0)
    until(lambda: leaver.incarnation in [life for life, *_ in first.left], "the goodbye is seen")
    ended.add(dead.incarnation)
    second.join(None)
    until(lambda: second.incarnation in [one.incarnation for one in first.joined], "the next life is seen")
    assert dead.incarnation in [life for life, *_ in first.left], "the death is told of first"
    first.group.leave(1.0)


def test_a_loss_that_one_worker_notices_is_told_to_all(store: Store) -> None:
    """Who cannot reach a worker looks whether it has ended, and the others learn of it from the store."""
    ended: set[Incarnation] = set()
    noticing, other = (Seat(store, name, rank, ended, look_interval_s=0.01) for rank, name in enumerate("ab"))
    dead = Seat(store, "dead", 2, ended)
    for seat in (noticing, other, dead):
        seat.join(None)
    until(lambda: len(noticing.joined) == len(other.joined) + 1 == 2, "all are known")
    ended.add(dead.incarnation)
    noticing.group.note_lost(dead.incarnation)
    until(lambda: dead.incarnation in [life for life, *_ in other.left], "the loss is told")
    for seat in (noticing, other):
        seat.group.leave(1.0)
