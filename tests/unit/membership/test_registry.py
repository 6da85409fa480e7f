"""The table of members."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.errors import UnknownWorkerError
from zrpc.ids import WorkerInfo
from zrpc.membership.group import Member
from zrpc.membership.registry import Registry


def member(name: str, rank: int, life: int = 0) -> Member:
    return Member(WorkerInfo(name, rank), bytes([rank, life]) * 4)


A, B = member("a", 0), member("b", 1)


def filled(*members: Member) -> Registry:
    registry = Registry()
    for one in members:
        assert registry.add(one)
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
    assert not registry.add(A)
    assert registry.remove(A.incarnation) is A
    assert registry.remove(A.incarnation) is None
    assert registry.all() == []


@pytest.mark.parametrize("newcomer", [member("a", 0, 1), member("a", 5), member("x", 0, 1)])
def test_a_new_life_of_a_name_or_rank_takes_the_place_of_the_old(newcomer: Member) -> None:
    registry = filled(A, B)
    assert registry.add(newcomer)
    assert registry.by_incarnation(A.incarnation) is None
    assert registry.all() == sorted([B.info, newcomer.info], key=lambda info: info.id)
    assert registry.remove(A.incarnation) is None, "word of the old life's end comes late"
    assert registry.by_name(newcomer.info.name) == newcomer.info


def test_one_newcomer_may_take_the_places_of_two() -> None:
    registry = filled(A, B)
    both = member("a", 1, 1)
    assert registry.add(both)
    assert registry.all() == [both.info]
    assert registry.by_name("a") == both.info
    with pytest.raises(UnknownWorkerError):
        registry.by_name("b")
    with pytest.raises(UnknownWorkerError):
        registry.by_rank(0)


members = st.builds(member, st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 1))


@given(st.lists(st.tuples(st.booleans(), members)))
def test_the_three_views_agree_whatever_comes_and_goes(steps: list[tuple[bool, Member]]) -> None:
    registry = Registry()
    here: list[Member] = []
    for comes, one in steps:
        known = any(other.incarnation == one.incarnation for other in here)
        if comes:
            assert registry.add(one) is not known
            if not known:
                here = [m for m in here if m.info.name != one.info.name and m.info.id != one.info.id] + [one]
        else:
            assert (registry.remove(one.incarnation) is not None) is known
            here = [m for m in here if m.incarnation != one.incarnation]
        assert registry.all() == sorted((m.info for m in here), key=lambda info: info.id)
        for m in here:
            assert registry.by_name(m.info.name) == registry.by_rank(m.info.id) == m.info
            assert registry.by_incarnation(m.incarnation) is registry.member(m.info.id)
