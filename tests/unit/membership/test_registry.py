"""The table of members."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.errors import StaleWorkerError, UnknownWorkerError
from zrpc.ids import ENDED_MAX, Incarnation, WorkerInfo
from zrpc.membership.group import Member
from zrpc.membership.registry import Registry


def member(name: str, rank: int, life: int = 0) -> Member:
    return Member(WorkerInfo(name, rank), bytes([rank, life]) * 4)


A, B = member("a", 0), member("b", 1)


def filled(*members: Member) -> Registry:
    registry = Registry()
    for one in members:
        assert registry.add(one) is not None
    return registry


def test_members_are_found_by_name_rank_and_incarnation() -> None:
    registry = filled(B, A)
    assert registry.by_name("b") == registry.by_rank(1) == B.info
    assert registry.member(1) is registry.by_incarnation(B.incarnation) is B
    assert registry.all() == [A.info, B.info]


def test_who_is_not_here_is_named_with_those_who_are() -> None:
    registry = filled(A, B)
    with pytest.raises(UnknownWorkerError, match=r"destination name c; the workers of this group are a \(0\), b \(1\)"):
        registry.by_name("c")
    with pytest.raises(UnknownWorkerError, match="destination id 7; the workers"):
        registry.by_rank(7)
    with pytest.raises(UnknownWorkerError, match="are none yet"):
        Registry().by_rank(0)
    assert registry.member(7) is None
    assert registry.by_incarnation(b"12345678") is None


def test_a_member_comes_once_and_goes_once() -> None:
    registry = filled(A)
    assert registry.add(A) is None
    assert registry.end(A.incarnation, "it left", keep=False) is A
    assert registry.end(A.incarnation, "it left", keep=False) is None
    assert registry.add(A) is None, "it comes again under another incarnation"
    assert registry.all() == []


@pytest.mark.parametrize("newcomer", [member("a", 0, 1), member("a", 5), member("x", 0, 1)])
def test_a_new_life_of_a_name_or_rank_takes_the_place_of_the_old(newcomer: Member) -> None:
    registry = filled(A, B)
    assert registry.add(newcomer) == [A]
    assert registry.by_incarnation(A.incarnation) is None
    assert registry.all() == sorted([B.info, newcomer.info], key=lambda info: info.id)
    assert registry.end(A.incarnation, "it left", keep=False) is None, "word of the old life's end comes late"
    assert registry.by_name(newcomer.info.name) == newcomer.info


def test_one_newcomer_may_take_the_places_of_two() -> None:
    registry = filled(A, B)
    both = member("a", 1, 1)
    assert registry.add(both) == [A, B]
    assert registry.all() == [both.info]
    assert registry.by_name("a") == both.info
    with pytest.raises(UnknownWorkerError):
        registry.by_name("b")
    with pytest.raises(UnknownWorkerError):
        registry.by_rank(0)


members = st.builds(member, st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 3))


@given(st.lists(st.tuples(st.booleans(), members)))
def test_the_three_views_agree_whatever_comes_and_goes(steps: list[tuple[bool, Member]]) -> None:
    registry = Registry()
    here: list[Member] = []
    over: set[Incarnation] = set()
    for comes, one in steps:
        known = any(other.incarnation == one.incarnation for other in here)
        if comes:
            assert (registry.add(one) is not None) is (one.incarnation not in over and not known)
            if one.incarnation not in over and not known:
                over |= {m.incarnation for m in here if m.info.name == one.info.name or m.info.id == one.info.id}
                here = [m for m in here if m.info.name != one.info.name and m.info.id != one.info.id] + [one]
        else:
            over.add(one.incarnation)
            assert (registry.end(one.incarnation, "gone", keep=False) is not None) is known
            here = [m for m in here if m.incarnation != one.incarnation]
        assert registry.all() == sorted((m.info for m in here), key=lambda info: info.id)
        for m in here:
            assert registry.by_name(m.info.name) == registry.by_rank(m.info.id) == m.info
            assert registry.by_incarnation(m.incarnation) is registry.member(m.info.id)


def test_a_worker_info_of_a_life_that_is_over_is_refused_and_says_what_to_do() -> None:
    """It names the worker and why it is gone, whether or not a new worker has its name."""
    registry = filled(A, B)
    assert registry.find(A.info) is A.info
    registry.end(A.incarnation, "it left the group", keep=False)
    with pytest.raises(StaleWorkerError, match=r"name=a\) names is not in the group any more \(it left the group\)"):
        registry.find(A.info)
    newcomer = member("a", 0, 1)
    registry.add(newcomer)
    with pytest.raises(StaleWorkerError, match=r"A new worker of that name is there: get_worker_info\('a'\)"):
        registry.find(A.info)
    assert registry.find("a") is registry.find(0) is registry.find(WorkerInfo("a", 0)) is newcomer.info


def test_a_life_may_stay_in_the_table_when_it_is_over() -> None:
    """So it is in a static group: its name says what happened."""
    registry = filled(A, B)
    assert registry.end(A.incarnation, "it died", keep=True) is A
    assert registry.find(A.info) is A.info
    assert registry.ended[A.incarnation] == "it died"


def test_hundreds_of_departures_leave_a_bounded_memory() -> None:
    """What is kept of those that left is the last of them."""
    registry = filled(B)
    for number in range(3 * ENDED_MAX):
        one = Member(WorkerInfo("guest", 2), number.to_bytes(8, "big"))
        registry.add(one)
        registry.end(one.incarnation, "it left", keep=False)
    assert registry.all() == [B.info]
    assert len(registry.ended) == ENDED_MAX
