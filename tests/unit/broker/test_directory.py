"""The broker's directory: who is let in, who is told what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zrpc.wire.messages import Forming, Heartbeat, Joined, Left, Refused, Register, Welcome
from zrpc_broker.actions import Action, Admit, Dismiss, Tell
from zrpc_broker.directory import Directory
from zrpc_broker.runs import Phase

if TYPE_CHECKING:
    from zrpc.ids import Incarnation

A, B, C = (bytes([letter]) * 8 for letter in b"ABC")


def directory() -> Directory:
    return Directory(heartbeat_interval_s=2.0)


def register(name: str, rank: int = -1, world_size: int = 0, group: str = "default") -> Register:
    return Register(name, rank, world_size, {}, group)


def told(actions: list[Action], to: Incarnation, kind: type[Any]) -> Any:
    """The one message of `kind` that `to` is told."""
    (message,) = [a.message for a in actions if isinstance(a, Tell) and a.to == to and isinstance(a.message, kind)]
    return message


def refusal(actions: list[Action], to: Incarnation) -> str:
    (action,) = actions
    reason = told([action], to, Refused).reason
    assert isinstance(reason, str)
    return reason


def test_a_static_group_is_welcomed_when_it_is_complete() -> None:
    d = directory()
    assert d.register(A, register("a", 1, 2)) == [Tell(A, Forming(["a"], 2, 2.0))]
    actions = d.register(B, register("b", 0, 2))
    assert actions[:2] == [Admit(A, 1), Admit(B, 1)]
    members = [[B, "b", 0, {}], [A, "a", 1, {}]]
    run = told(actions, A, Welcome).run
    assert actions[2:] == [Tell(A, Welcome(1, members, 2.0, run)), Tell(B, Welcome(0, members, 2.0, run))]


def test_ranks_left_to_the_broker_are_the_lowest_that_nobody_asks_for() -> None:
    d = directory()
    d.register(A, register("a", -1, 3))
    d.register(B, register("b", 0, 3))
    actions = d.register(C, register("c", -1, 3))
    assert [told(actions, worker, Welcome).rank for worker in (A, B, C)] == [1, 0, 2]


def test_a_dynamic_group_tells_of_comings_and_goings() -> None:
    d = directory()
    assert told(d.register(A, register("a")), A, Welcome).rank == 0
    actions = d.register(B, register("b"))
    assert actions[0] == Admit(B, 1)
    assert actions[1] == Tell(A, Joined(B, "b", 1, {}))
    assert told(actions, B, Welcome).members == [[A, "a", 0, {}], [B, "b", 1, {}]]
    assert d.lose(A, "died") == [Dismiss(A), Tell(B, Left(A, True, "died"))]
    assert told(d.register(C, register("a")), C, Welcome).rank == 0, "name and rank are free again"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (register("a", 1, 2), "name a is not unique"),
        (register("b", 0, 2), "rank 0 is taken by 'a'"),
        (register("b", 1, 3), "begun with world_size=2 and 'b' came with world_size=3"),
        (register("b"), "no world_size"),
        (register("b", 2, 2), "from 0 to 1"),
        (register("b", -2, 2), "out of range"),
        (register("b", 0, -1), "world_size is -1"),
        (register("b b", 1, 2), "must match"),
        (Register("b", "1", 2, {}), "install the same zrpc"),  # type: ignore[arg-type]  # from the wire, unchecked
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(wanted: Register, words: str) -> None:
    d = directory()
    d.register(A, register("a", 0, 2))
    assert words in refusal(d.register(B, wanted), B)
    assert B not in d


def test_a_complete_group_refuses_newcomers_and_says_what_to_do() -> None:
    d = directory()
    d.register(A, register("a", -1, 1))
    reason = refusal(d.register(B, register("b", -1, 1)), B)
    assert "complete" in reason
    assert "ZRPC_GROUP" in reason


def test_a_refused_worker_leaves_no_trace() -> None:
    d = directory()
    d.register(A, register("a", 5, 2))
    assert told(d.register(B, register("b", 0, 1)), B, Welcome).rank == 0, "another world size is free to choose"


def test_a_worker_lost_while_the_group_forms_frees_its_name() -> None:
    d = directory()
    d.register(A, register("a", 0, 2))
    assert d.lose(A, "died") == []
    d.register(B, register("a", 0, 2))
    assert told(d.register(C, register("c", 1, 2)), B, Welcome).members == [[B, "a", 0, {}], [C, "c", 1, {}]]


def test_a_worker_may_come_back_before_the_slowest_of_the_last_run_has_left() -> None:
    d = directory()
    d.register(A, register("a", 0, 2))
    d.register(B, register("b", 1, 2))
    assert d.leave(A) == [Dismiss(A), Tell(B, Left(A, False, "it left the group")), Tell(A, Left(A, False, ""))]
    assert told(d.register(C, register("a", 0, 2)), C, Forming).names == ["a"]
    d.leave(B)
    actions = d.register(B, register("b", 1, 2))
    assert [told(actions, worker, Welcome).rank for worker in (C, B)] == [0, 1]
    assert actions[0] == Admit(C, 2), "the second run has a room of its own"


def test_groups_do_not_see_each_other() -> None:
    d = directory()
    d.register(A, register("a", group="one"))
    actions = d.register(B, register("a", group="two"))
    assert told(actions, B, Welcome).members == [[B, "a", 0, {}]]
    assert actions[0] == Admit(B, 2)


def test_heartbeats_are_answered_by_what_the_worker_must_know() -> None:
    d = directory()
    assert "does not know this worker" in refusal(d.heartbeat(A), A)
    d.register(A, register("a", 0, 2))
    assert d.heartbeat(A) == [Tell(A, Forming(["a"], 2, 2.0))]
    d.register(B, register("b", 1, 2))
    assert d.heartbeat(A) == [Tell(A, Heartbeat())]


def test_goodbyes_of_strangers_are_answered_and_their_loss_is_nobodys() -> None:
    d = directory()
    assert d.leave(A) == [Tell(A, Left(A, False, ""))]
    assert d.lose(A, "died") == []


class DirectoryMachine(RuleBasedStateMachine):
    """Any order of comings, goings and losses: what the workers were told is always the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = directory()
        self.made = 0
        self.rooms: dict[Incarnation, int] = {}
        self.views: dict[Incarnation, dict[Incarnation, tuple[str, int]]] = {}
        self.here: list[Incarnation] = []

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Admit):
                assert action.incarnation not in self.rooms
                self.rooms[action.incarnation] = action.room
            elif isinstance(action, Dismiss):
                del self.rooms[action.incarnation]
            else:
                self.tell(action)

    def tell(self, action: Tell) -> None:
        message = action.message
        if isinstance(message, Welcome):
            assert action.to not in self.views
            self.views[action.to] = {life: (name, rank) for life, name, rank, _ in message.members}
        elif isinstance(message, Joined):
            assert message.incarnation not in self.views[action.to]
            self.views[action.to][message.incarnation] = (message.name, message.rank)
        elif isinstance(message, Left) and message.incarnation != action.to:
            del self.views[action.to][message.incarnation]

    @rule(
        name=st.sampled_from("abcd"),
        rank=st.integers(-1, 3),
        world_size=st.integers(0, 3),
        group=st.sampled_from(["one", "two"]),
    )
    def come(self, name: str, rank: int, world_size: int, group: str) -> None:
        self.made += 1
        incarnation = self.made.to_bytes(8, "big")
        actions = self.directory.register(incarnation, register(name, rank, world_size, group))
        answers = [type(a.message) for a in actions if isinstance(a, Tell) and a.to == incarnation]
        assert answers in ([Welcome], [Forming], [Refused])
        if answers != [Refused]:
            self.here.append(incarnation)
        self.carry_out(actions)

    @rule(pick=st.integers(0, 100), lost=st.booleans())
    def go(self, pick: int, lost: bool) -> None:
        if self.here:
            incarnation = self.here.pop(pick % len(self.here))
            self.views.pop(incarnation, None)
            self.carry_out(self.directory.lose(incarnation, "died") if lost else self.directory.leave(incarnation))

    @invariant()
    def names_and_ranks_are_unique(self) -> None:
        for view in self.views.values():
            assert len({name for name, _ in view.values()}) == len(view)
            assert len({rank for _, rank in view.values()}) == len(view)
            assert all(rank >= 0 for _, rank in view.values())

    @invariant()
    def every_view_is_the_room(self) -> None:
        assert set(self.views) == set(self.rooms)
        for incarnation, view in self.views.items():
            assert set(view) == {other for other, room in self.rooms.items() if room == self.rooms[incarnation]}

    @invariant()
    def a_static_group_begins_complete(self) -> None:
        for incarnation, view in self.views.items():
            run = self.directory.run_of(incarnation)
            assert run is not None
            if run.phase is Phase.RUNNING:
                assert sorted(rank for _, rank in view.values()) == list(range(run.world_size))

    def teardown(self) -> None:
        for incarnation in self.here:
            self.directory.leave(incarnation)
        for group in ("one", "two"):
            fresh = self.directory.register(A, register("a", 0, 7, group))
            assert told(fresh, A, Forming).names == ["a"], "an empty group is forgotten"
            self.directory.leave(A)


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
