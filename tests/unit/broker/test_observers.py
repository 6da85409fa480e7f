"""Observers are let into the room of a group, and are no members of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.keys import Keys
from zrpc.ids import new_incarnation
from zrpc.keyring import Keyring
from zrpc.wire.messages import Refused, Register
from zrpc.wire.observing import Attach, Attached
from zrpc_broker.actions import Admit, Dismiss, Tell
from zrpc_broker.directory import Directory
from zrpc_broker.observers import NO_GROUP, attach

if TYPE_CHECKING:
    from pathlib import Path

ME = new_incarnation()


def group_of(*names: str, world_size: int) -> Directory:
    directory = Directory(1.0)
    for rank, name in enumerate(names):
        directory.register(new_incarnation(), Register(name, rank, world_size, {}))
    return directory


def test_an_observer_is_told_the_members_and_no_member_of_it() -> None:
    directory = group_of("a", "b", world_size=2)
    left, admitted, told = attach(directory, None, ME, Attach("default"))
    assert left == Dismiss(ME)
    assert isinstance(admitted, Admit)
    assert admitted.incarnation == ME
    assert isinstance(told, Tell)
    assert told.to == ME
    assert isinstance(told.message, Attached)
    assert [entry[1:3] for entry in told.message.members] == [["a", 0], ["b", 1]]
    assert ME not in directory
    assert directory.count("default") == 2


def test_an_observer_sees_a_group_that_is_not_complete() -> None:
    told = attach(group_of("a", world_size=3), None, ME, Attach("default"))[-1]
    assert isinstance(told, Tell)
    assert isinstance(told.message, Attached)
    assert (len(told.message.members), told.message.world_size) == (1, 3)


def test_there_may_be_no_such_group() -> None:
    """Nor is one with a name that is too long."""
    for name in ("other", "x" * 1000):
        assert attach(group_of("a", world_size=1), None, ME, Attach(name)) == [
            Dismiss(ME), Tell(ME, Attached([], 0, NO_GROUP)),
        ]  # fmt: skip


def test_a_worker_is_no_observer() -> None:
    directory = group_of(world_size=1)
    directory.register(ME, Register("a", 0, 1, {}))
    (told,) = attach(directory, None, ME, Attach("default"))
    assert isinstance(told, Tell)
    assert isinstance(told.message, Refused)
    assert ME in directory


def test_a_key_must_be_allowed_the_name_of_an_observer(tmp_path: Path) -> None:
    """Whatever ranks it may claim."""
    keys = Keys(tmp_path)
    lives = {
        label: keys.new(label, *names, ranks=ranks).new_life()
        for label, names, ranks in (
            ("worker", ["w*"], "0"),
            ("operator", ["zrpc-observer"], "0"),
            ("all", ["*"], "any"),
        )
    }
    ring, directory = Keyring(keys.path), group_of("a", world_size=1)
    answers = {label: attach(directory, ring, life, Attach("default"))[-1] for label, life in lives.items()}
    kinds = {label: type(told.message) for label, told in answers.items() if isinstance(told, Tell)}
    assert kinds == {"worker": Refused, "operator": Attached, "all": Attached}
