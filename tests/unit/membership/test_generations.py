"""Which of the groups over one store a worker is in."""

from __future__ import annotations

from zrpc.membership.rendezvous import _Generations


def test_static_groups_are_numbered() -> None:
    generations = _Generations()
    assert [generations.enter(dynamic=False) for _ in range(3)] == [0, 1, 2]


def test_who_comes_back_to_a_dynamic_group_finds_it() -> None:
    generations = _Generations()
    assert [generations.enter(dynamic=True) for _ in range(3)] == [0, 0, 0]


def test_groups_of_both_kinds_do_not_meet() -> None:
    generations = _Generations()
    kinds = [False, True, True, False, False, True]
    assert [generations.enter(kind) for kind in kinds] == [0, 1, 1, 2, 3, 4]
