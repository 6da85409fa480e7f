"""A broker that knows nothing, and members of the one before who come back to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.wire.messages import Forming, Heartbeat, Joined, Left, Refused, Register, Welcome
from zrpc.wire.rejoining import Rejoin
from zrpc_broker.actions import Action, Admit, Dismiss, Expect, Release, Tell
from zrpc_broker.directory import CLAIM_S, Directory
from zrpc_broker.rebuilding import TOO_LATE
from zrpc_broker.runs import RUN_NBYTES

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
def test_members_are_welcomed_at_once_and_told_of_those_that_come_later(world_size: int) -> None:
    """Those that it named are members still; what they are sent is kept, and each is given it after its welcome."""
    d = directory()
    actions = d.rejoin(A, rejoin(A, {A, B, C}, world_size=world_size), 0.0)
    welcome = told(actions, Welcome)[A]
    assert welcome.members == [[A, "a", 0, {"of": "a"}], [B, "b", 1, {}], [C, "c", 2, {}]]
    assert (welcome.rank, welcome.run) == (0, RUN)
    assert {one.incarnation for one in actions if isinstance(one, Expect)} == {B, C}
    assert d.heartbeat(A) == [Tell(A, Heartbeat())]
    d.rejoin(C, rejoin(C, {A, B, C}, world_size=world_size), 0.1)
    actions = d.rejoin(B, rejoin(B, {A, B, C}, world_size=world_size), 5.0)
    assert actions[0] == Admit(B, 1)
    assert actions[-1] == Release(B)
    assert told(actions, Welcome).keys() == {B}
    assert members_of(told(actions, Welcome)[B]) == {A, B, C}
    assert told(actions, Joined) == dict.fromkeys([A, C], Joined(B, "b", 1, {"of": "b"}))
    assert d.tick(100.0) == []


@pytest.mark.parametrize("world_size", [0, 3])
def test_those_that_do_not_come_back_in_time_are_lost_for_all(world_size: int) -> None:
    d = directory()
    d.rejoin(A, rejoin(A, {A, B, C}, world_size=world_size), 0.0)
    d.rejoin(B, rejoin(B, {A, B, C}, world_size=world_size), 1.0)
    assert d.tick(WAIT_S - 0.1) == []
    actions = d.tick(WAIT_S)
    assert actions[0] == Dismiss(C)
    assert told(actions, Left) == dict.fromkeys([A, B], Left(C, True, TOO_LATE))
    (late,) = d.rejoin(C, rejoin(C, {A, B, C}, world_size=world_size), 20.0)
    assert isinstance(late, Tell)
    assert isinstance(late.message, Refused)
    assert "lost for the others: it did not come back to the broker in time" in late.message.reason


@pytest.mark.parametrize("lost", [True, False])
def test_one_that_goes_while_others_are_away_is_gone_for_them_too(lost: bool) -> None:
    """They are told when they come back, and why."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B, C}), 0.0)
    d.rejoin(B, rejoin(B, {A, B, C}), 0.0)
    gone = d.lose(B, "died") if lost else d.leave(B)
    assert told(gone, Left)[A].lost is lost
    actions = d.rejoin(C, rejoin(C, {A, B, C}), 1.0)
    assert members_of(told(actions, Welcome)[C]) == {A, C}
    assert told(actions, Left)[C] == Left(B, lost, "died" if lost else "it left the group")


def test_one_that_says_goodbye_before_it_is_back_is_not_waited_for() -> None:
    """The others are told that it left."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}), 0.0)
    assert told(d.leave(B), Left)[A] == Left(B, False, "it left the group")
    assert d.tick(WAIT_S) == []


def test_newcomers_come_in_beside_members_that_are_not_back_under_other_names_and_ranks() -> None:
    """Once the broker has run for a second: a member that nobody has named yet may be on its way."""
    d = directory(settle_s=1.0)
    assert d.register(D, register("d"), 0.2) == d.heartbeat(D) == [Tell(D, Forming([], 0, 2.0))]
    assert told(d.rejoin(A, rejoin(A, {A, B}), 0.5), Welcome).keys() == {A}
    assert d.tick(0.9) == []
    actions = d.tick(1.0)
    assert (told(actions, Welcome)[D].rank, members_of(told(actions, Welcome)[D])) == (2, {A, D})
    assert told(actions, Joined)[A].incarnation == D
    actions = d.rejoin(B, rejoin(B, {A, B}), 3.0)
    assert told(actions, Joined).keys() == {A, D}
    assert members_of(told(actions, Welcome)[B]) == {A, B, D}


@pytest.mark.parametrize(("name", "rank"), [("b", -1), ("d", 1), ("b", 1)])
def test_the_name_and_rank_of_one_that_is_not_back_are_kept_for_it_for_a_short_time(name: str, rank: int) -> None:
    """Then it is lost, another life has them, and it is told so if it comes after all."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}), 0.0)
    assert d.register(D, register(name, rank), 0.5) == [Tell(D, Forming([], 0, 2.0))]
    assert d.tick(CLAIM_S - 0.1) == []
    actions = d.tick(CLAIM_S)
    about_a = [one.message for one in actions if isinstance(one, Tell) and one.to == A]
    assert about_a == [Left(B, True, TOO_LATE), Joined(D, name, 1, {})], "never two lives of a name at once"
    assert members_of(told(actions, Welcome)[D]) == {A, D}
    assert TOO_LATE in told(d.rejoin(B, rejoin(B, {A, B}), CLAIM_S + 1), Refused)[B].reason


def test_a_member_that_comes_back_before_its_name_is_given_away_has_it() -> None:
    """Whoever wanted the name is told that it is taken."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}), 0.0)
    d.register(D, register("b"), 0.5)
    actions = d.rejoin(B, rejoin(B, {A, B}), 1.0)
    assert told(actions, Welcome).keys() == {B}
    assert "name b is not unique" in told(actions, Refused)[D].reason


def test_a_new_life_comes_in_at_once_when_the_old_one_is_away_for_long() -> None:
    """A worker that was started again takes longer than that."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}), 0.0)
    assert told(d.register(D, register("b"), CLAIM_S), Welcome).keys() == {D}


def test_newcomers_to_a_static_group_wait_until_it_is_known_whether_it_is_complete() -> None:
    """They begin the next run where a member is lost."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}, world_size=2), 0.0)
    assert d.register(D, register("b", 1, 2), 5.0) == [Tell(D, Forming([], 0, 2.0))]
    actions = d.tick(WAIT_S)
    assert told(actions, Left)[A].incarnation == B
    assert told(actions, Forming)[D] == Forming(["b"], 2, 2.0)


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


@pytest.mark.parametrize("world_size", [0, 2])
def test_one_that_was_named_and_registers_has_the_place_that_it_was_given(world_size: int) -> None:
    """It was not told that it had come in, as the broker died."""
    d = directory()
    d.rejoin(A, rejoin(A, {A, B}, world_size=world_size), 0.0)
    actions = d.register(B, register("b", -1, world_size), 0.5)
    welcome = told(actions, Welcome)[B]
    assert (welcome.rank, welcome.run, members_of(welcome)) == (1, RUN, {A, B})
    assert told(actions, Joined)[A].incarnation == B
    assert d.tick(WAIT_S + 1) == []


def test_one_that_was_not_told_waits_until_its_static_group_is_complete() -> None:
    """It has to know all members when it begins; the others go on."""
    d = directory()
    assert told(d.rejoin(A, rejoin(A, {A, B, C}, world_size=3), 0.0), Welcome).keys() == {A}
    assert d.register(B, register("b", 1, 3), 0.5) == []
    assert d.heartbeat(B) == [Tell(B, Heartbeat())]
    actions = d.rejoin(C, rejoin(C, {A, B, C}, world_size=3), 1.0)
    assert members_of(told(actions, Welcome)[B]) == {A, B, C}


def test_a_member_that_names_a_worker_of_another_group_does_not_harm_it() -> None:
    """That one is where it is."""
    d = directory()
    d.register(D, Register("d", -1, 0, {}, "other"), 0.0)
    welcome = told(d.rejoin(A, rejoin(A, {A}, members=[[D, "d", 7]]), 0.0), Welcome)[A]
    assert members_of(welcome) == {A}
    assert d.tick(WAIT_S + 1) == []
    assert D in d
    d.rejoin(B, rejoin(B, {B}, members=[[C, "c", 2]]), 20.0)
    assert told(d.register(C, Register("c", -1, 0, {}, "other"), 20.0), Welcome).keys() == {C}
    assert d.tick(20.0 + WAIT_S) == []


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
    assert told(d.rejoin(B, rejoin(B, {B, C}), 0.1), Welcome).keys() == {B}
    assert told(d.rejoin(C, rejoin(C, {B, C}), 0.2), Welcome).keys() == {C}


Views = dict["Incarnation", dict["Incarnation", tuple[str, int]]]


def follow(known: Views, actions: list[Action]) -> None:
    """What workers know of their members as they are told this. No two of them have one name or rank, at any time."""
    for action in actions:
        if isinstance(action, Tell):
            to, message = action.to, action.message
            if isinstance(message, Welcome):
                known[to] = {life: (name, rank) for life, name, rank, _ in message.members}
            elif isinstance(message, Refused):
                known.pop(to, None)
            elif isinstance(message, Joined):
                known[to][message.incarnation] = (message.name, message.rank)
            elif isinstance(message, Left):
                known.get(to, {}).pop(message.incarnation, None)  # one that is not welcomed yet knows it, too
            for view in known.values():
                assert len({name for name, _ in view.values()}) == len(view), known
                assert len({rank for _, rank in view.values()}) == len(view), known


@given(st.data())
def test_however_they_come_back_a_loss_is_one_for_all(data: st.DataObject) -> None:
    """Whoever is in the group has the same members as the others, itself among them."""
    d = directory()
    lives = [A, B, C]
    known: Views = {}
    now = 0.0
    world_size = data.draw(st.sampled_from([0, 3]))
    for life in data.draw(st.permutations(lives)):
        now += data.draw(st.sampled_from([0.0, 1.0, WAIT_S + 1]))
        ended = data.draw(st.sets(st.sampled_from(lives))) - {life}
        follow(known, d.tick(now))
        follow(known, d.rejoin(life, rejoin(life, set(lives) - ended, ended, world_size=world_size), now))
    follow(known, d.tick(now + WAIT_S))
    assert all(view.keys() == known.keys() for view in known.values())
    assert all(life in d for life in known)


@given(st.data())
def test_newcomers_members_and_losses_in_any_order_leave_one_view(data: st.DataObject) -> None:
    """Members know some of each other, others take their names and ranks, and some die or leave."""
    d = directory(settle_s=data.draw(st.sampled_from([0.0, 1.0])))
    members, newcomers = [A, B, C], [D, b"EEEEEEEE", b"FFFFFFFF"]
    known: Views = {}
    now = 0.0
    coming = [*members, *newcomers]
    for _ in range(data.draw(st.integers(1, 12))):
        now += data.draw(st.sampled_from([0.0, 0.5, CLAIM_S, WAIT_S]))
        follow(known, d.tick(now))
        what = data.draw(st.sampled_from(["come", "come", "come", "lose", "leave"]))
        if what != "come":
            life = data.draw(st.sampled_from([*members, *newcomers]))
            if life in coming and life in newcomers:
                continue
            coming = [one for one in coming if one != life]
            known.pop(life, None)
            follow(known, d.lose(life, "died") if what == "lose" else d.leave(life))
        elif coming:
            life = coming.pop(data.draw(st.integers(0, len(coming) - 1)))
            if life in RANKS:
                ended = data.draw(st.sets(st.sampled_from(members))) - {life}
                knows = data.draw(st.sets(st.sampled_from(members))) - ended
                follow(known, d.rejoin(life, rejoin(life, knows, ended), now))
            else:
                name, rank = data.draw(st.sampled_from("abcd")), data.draw(st.integers(-1, 3))
                follow(known, d.register(life, register(name, rank), now))
    follow(known, d.tick(now + WAIT_S))
    follow(known, d.tick(now + 2 * WAIT_S))
    assert all(view.keys() == known.keys() for view in known.values())
    assert all(life in d for life in known)
