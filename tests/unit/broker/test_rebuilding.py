"""A broker that knows nothing, and members of the one before who come back to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.wire.messages import Forming, Heartbeat, Joined, Left, Refused, Register, Welcome
from zrpc.wire.rejoining import Rejoin
from zrpc_broker.actions import Action, Admit, Tell
from zrpc_broker.directory import RUN_NBYTES, Directory

if TYPE_CHECKING:
    from zrpc.ids import Incarnation

A, B, C, D = (bytes([letter]) * 8 for letter in b"ABCD")
RANKS = {A: ("a", 0), B: ("b", 1), C: ("c", 2)}
RUN = b"r" * RUN_NBYTES
WAIT_S = 10.0


def directory(settle_s: float = 0.0) -> Directory:
    return Directory(2.0, 0.0, settle_s, WAIT_S)


def rejoin(
    source: Incarnation, knows: set[Incarnation], over: set[Incarnation] = frozenset(), *, world_size: int = 0,  # type: ignore[assignment]
    run: bytes = RUN, **changes: Any,
) -> Rejoin:  # fmt: skip
    name, rank = RANKS[source]
    named = [[other, *RANKS[other]] for other in sorted(knows - {source})]
    fields = {"name": name, "rank": rank, "card": {"of": name}, "group": "g", "members": named, "ended": sorted(over)}
    return Rejoin(world_size=world_size, run=run, **{**fields, **changes})  # type: ignore[arg-type]


def register(name: str, rank: int = -1, world_size: int = 0) -> Register:
    return Register(name, rank, world_size, {}, "g")


def told(actions: list[Action], kind: type[Any]) -> dict[Incarnation, Any]:
    return {one.to: one.message for one in actions if isinstance(one, Tell) and isinstance(one.message, kind)}


def members_of(welcome: Welcome) -> set[Incarnation]:
    return {entry[0] for entry in welcome.members}


@pytest.mark.parametrize("world_size", [0, 3])
def test_members_are_welcomed_once_all_that_they_name_are_back(world_size: int) -> None:
    d = directory()
    assert d.rejoin(A, rejoin(A, {A, B, C}, world_size=world_size), 0.0) == []
    assert d.rejoin(C, rejoin(C, {A, B, C}, world_size=world_size), 0.1) == []
    assert d.heartbeat(A) == [Tell(A, Heartbeat())], "it is here, and waits"
    actions = d.rejoin(B, rejoin(B, {A, B, C}, world_size=world_size), 0.2)
    assert {one.incarnation for one in actions if isinstance(one, Admit)} == {A, B, C}
    welcomes = told(actions, Welcome)
    assert {life: (one.rank, one.run) for life, one in welcomes.items()} == {A: (0, RUN), B: (1, RUN), C: (2, RUN)}
    assert all(members_of(welcome) == {A, B, C} for welcome in welcomes.values())
    assert welcomes[A].members[1] == [B, "b", 1, {"of": "b"}]


def test_those_that_do_not_come_back_in_time_are_lost_for_all() -> None:
    d = directory()
    d.rejoin(A, rejoin(A, {A, B, C}), 0.0)
    d.rejoin(B, rejoin(B, {A, B, C}), 1.0)
    assert d.tick(1.0 + WAIT_S - 0.1) == []
    welcomes = told(d.tick(1.0 + WAIT_S), Welcome)
    assert {life: members_of(welcome) for life, welcome in welcomes.items()} == {A: {A, B}, B: {A, B}}
    (late,) = d.rejoin(C, rejoin(C, {A, B, C}), 20.0)
    assert isinstance(late, Tell)
    assert isinstance(late.message, Refused)
    assert "lost for the others: it did not come back to the broker in time" in late.message.reason


def test_one_that_dies_while_others_are_waited_for_is_not_welcomed() -> None:
    d = directory()
    d.rejoin(A, rejoin(A, {A, B, C}), 0.0)
    d.rejoin(B, rejoin(B, {A, B, C}), 0.0)
    d.lose(B, "died")
    actions = d.rejoin(C, rejoin(C, {A, B, C}), 1.0) + d.tick(WAIT_S + 1.0)
    assert {life: members_of(welcome) for life, welcome in told(actions, Welcome).items()} == {A: {A, C}, C: {A, C}}


def test_newcomers_wait_until_it_is_known_which_names_and_ranks_are_free() -> None:
    d = directory(settle_s=1.0)
    assert d.register(D, register("d"), 0.2) == d.heartbeat(D) == [Tell(D, Forming([], 0, 2.0))]
    assert d.rejoin(A, rejoin(A, {A, B}), 0.5) == []
    assert d.rejoin(B, rejoin(B, {A, B}), 0.6) == []
    actions = d.tick(1.0)
    welcomes = told(actions, Welcome)
    assert members_of(welcomes[A]) == members_of(welcomes[B]) == {A, B}
    assert (welcomes[D].rank, members_of(welcomes[D])) == (2, {A, B, D})
    assert told(actions, Joined).keys() == {A, B}


def test_a_newcomer_to_a_broker_that_follows_none_waits_for_a_second_only() -> None:
    d = directory(settle_s=1.0)
    d.register(D, register("d"), 0.2)
    assert d.tick(0.9) == []
    assert told(d.tick(1.0), Welcome)[D].rank == 0
    assert told(d.register(A, register("a"), 1.1), Welcome)[A].rank == 1


def test_members_that_come_after_newcomers_keep_their_names_or_are_refused() -> None:
    """The broker had waited for nobody: one has a rank that a newcomer has by now."""
    d = directory()
    d.register(D, register("d"), 5.0)
    refused = told(d.rejoin(A, rejoin(A, {A, B}), 6.0), Refused)
    assert "rank 0 is taken by 'd'" in refused[A].reason
    actions = d.rejoin(B, rejoin(B, {B}), 6.0)
    assert members_of(told(actions, Welcome)[B]) == {B, D}
    assert told(actions, Joined)[D].incarnation == B


def test_one_that_was_not_told_that_its_static_group_had_begun_is_moved_into_it() -> None:
    """The broker died while it welcomed them."""
    d = directory()
    d.register(B, register("b", 1, 2), 0.0)
    actions = d.rejoin(A, rejoin(A, {A, B}, world_size=2), 0.1)
    welcomes = told(actions, Welcome)
    assert {life: (one.rank, members_of(one)) for life, one in welcomes.items()} == {A: (0, {A, B}), B: (1, {A, B})}


def test_a_static_group_of_which_one_is_gone_takes_no_other_in() -> None:
    """The next worker to register begins the next run of it."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}, world_size=3), 0.0)
    d.rejoin(B, rejoin(B, {A, B}, world_size=3), 0.0)
    assert told(d.register(D, register("d", 0, 3), 1.0), Refused) == {}
    assert told(d.leave(A), Left)[B].incarnation == A


def test_one_that_most_take_for_a_member_stays_and_who_was_told_otherwise_goes() -> None:
    """The broker had told one of them of a loss, and died."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, C}, {B}), 0.0)
    d.rejoin(B, rejoin(B, {A, B, C}), 0.0)
    actions = d.rejoin(C, rejoin(C, {A, B, C}), 0.0)
    assert told(actions, Refused).keys() == {A}
    assert {life: members_of(one) for life, one in told(actions, Welcome).items()} == {B: {B, C}, C: {B, C}}


def test_one_that_is_lost_for_half_of_them_is_refused() -> None:
    """Also if those were welcomed before it came."""
    d = directory()
    assert told(d.rejoin(A, rejoin(A, {A}, {B}), 0.0), Welcome).keys() == {A}
    actions = d.rejoin(B, rejoin(B, {B}), 0.1)
    assert told(actions, Refused).keys() == {B}
    assert told(actions, Joined) == {}


@pytest.mark.parametrize("world_size", [0, 3])
def test_one_alone_cannot_have_the_others_taken_for_lost(world_size: int) -> None:
    """It comes first, and says that all others are over."""
    d = directory()
    assert told(d.rejoin(A, rejoin(A, {A}, {B, C}, world_size=world_size), 0.0), Welcome).keys() == {A}
    assert d.rejoin(B, rejoin(B, {A, B, C}, world_size=world_size), 0.1) == []
    actions = d.rejoin(C, rejoin(C, {A, B, C}, world_size=world_size), 0.2)
    assert told(actions, Refused).keys() == {A}
    assert {life: members_of(one) for life, one in told(actions, Welcome).items()} == {B: {B, C}, C: {B, C}}


def test_a_life_that_this_broker_took_for_lost_does_not_come_back() -> None:
    d = directory()
    d.register(A, register("a"), 0.0)
    run = told(d.register(B, register("b"), 0.0), Welcome)[B].run
    d.lose(B, "its host is gone")
    assert "its host is gone" in told(d.rejoin(B, rejoin(B, {A, B}, run=run), 1.0), Refused)[B].reason


@pytest.mark.parametrize(
    "changes",
    [
        {"run": b"short"},
        {"members": [["x", "b", 1]]},
        {"members": [[B, "b", -1]]},
        {"members": [[B, "no name!", 1]]},
        {"members": [[B, "b"]]},
        {"members": [7]},
        {"ended": [b"short"]},
        {"ended": [None]},
        {"rank": -1},
        {"name": ""},
    ],
)
def test_a_return_that_says_what_cannot_be_is_refused_and_others_are_not_harmed(changes: dict[str, Any]) -> None:
    d = directory()
    assert told(d.rejoin(A, rejoin(A, {A, B}, **changes), 0.0), Refused).keys() == {A}
    d.rejoin(B, rejoin(B, {B, C}), 0.1)
    assert told(d.rejoin(C, rejoin(C, {B, C}), 0.2), Welcome).keys() == {B, C}


def follow(known: dict[Incarnation, set[Incarnation]], actions: list[Action]) -> None:
    """What workers know of their members once they are told this."""
    for action in actions:
        if isinstance(action, Tell):
            to, message = action.to, action.message
            if isinstance(message, Welcome):
                known[to] = members_of(message)
            elif isinstance(message, Refused):
                known.pop(to, None)
            elif isinstance(message, Joined):
                known[to].add(message.incarnation)
            elif isinstance(message, Left):
                known.get(to, set()).discard(message.incarnation)  # one that is not welcomed yet knows it, too


@given(st.data())
def test_however_they_come_back_a_loss_is_one_for_all(data: st.DataObject) -> None:
    """Whoever is in the group has the same members as the others, itself among them."""
    d = directory()
    lives = [A, B, C]
    known: dict[Incarnation, set[Incarnation]] = {}
    now = 0.0
    world_size = data.draw(st.sampled_from([0, 3]))
    for life in data.draw(st.permutations(lives)):
        now += data.draw(st.sampled_from([0.0, 1.0, WAIT_S + 1]))
        ended = data.draw(st.sets(st.sampled_from(lives))) - {life}
        follow(known, d.tick(now))
        follow(known, d.rejoin(life, rejoin(life, set(lives) - ended, ended, world_size=world_size), now))
    follow(known, d.tick(now + WAIT_S))
    assert all(members == set(known) for members in known.values())
    assert all(life in d for life in known)
