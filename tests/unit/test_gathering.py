"""What one worker knows of a gathering, and when that is all."""

from __future__ import annotations

from zrpc.gathering import Gathering, Key, Lost

NAMES = ("a", "b", "c")


def gathering(me: str, *came: str, survives_loss: bool = True) -> Gathering:
    return Gathering(Key(NAMES, 0, survives_loss), me, {name: name.upper() for name in came})


def test_it_is_complete_on_the_leader_when_all_have_come() -> None:
    """The leader has the objects of all, and is to tell the others."""
    for survives_loss in (False, True):
        one = gathering("a", "a", "b", "c", survives_loss=survives_loss)
        one.settle({})
        assert (one.is_complete, one.is_led_here, one.objects) == (True, True, {"a": "A", "b": "B", "c": "C"})


def test_a_follower_waits_for_the_leader_also_when_all_have_come() -> None:
    """Only the leader completes it."""
    one = gathering("b", "a", "b", "c")
    one.settle({"c": "gone"})
    assert not one.is_complete
    one.conclude({"a": 1, "b": 2, "c": Lost("gone")}, None)
    assert (one.is_complete, one.is_led_here, one.objects["c"]) == (True, False, Lost("gone"))


def test_a_loss_ends_one_that_does_not_survive_losses() -> None:
    """The error names the worker that is waited for in vain, on the leader and on a follower."""
    leader, follower = gathering("a", "a", survives_loss=False), gathering("b", "b", survives_loss=False)
    leader.settle({"c": "gone"})
    follower.settle({"a": "gone"})
    assert [leader.error, follower.error] == ["c is lost (gone)", "a is lost (gone)"]


def test_where_losses_are_survived_the_living_are_waited_for() -> None:
    """The lost ones are named once all others have come, whether or not they had come themselves."""
    one = gathering("a", "a", "b")
    one.settle({"b": "gone"})
    assert not one.is_complete
    one.objects["c"] = "C"
    one.settle({"b": "gone"})
    assert (one.is_complete, one.objects) == (True, {"a": "A", "b": Lost("gone"), "c": "C"})


def test_the_next_name_leads_where_the_leader_is_lost() -> None:
    """It does not complete it before it has come itself."""
    one = gathering("b", "a", "c")
    assert [one.leader({}), one.leader({"a": "gone"}), one.leader({"a": "gone", "b": "no"})] == ["a", "b", "b"]
    one.settle({"a": "gone"})
    assert not one.is_complete
    one.objects["b"] = "B"
    one.settle({"a": "gone"})
    assert (one.is_led_here, one.objects["a"]) == (True, Lost("gone"))
