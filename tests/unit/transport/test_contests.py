"""What newer connections of workers say, while older ones are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zmq

from zrpc.transport.contests import CONTEST_S, CONTESTS_MAX, LOOK_S, MESSAGE_MAX_NBYTES, MESSAGES_MAX, Contests

if TYPE_CHECKING:
    from zrpc.transport.contests import Message

A, B = b"A" * 8, b"B" * 8


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def message(text: bytes) -> Message:
    frame = zmq.Frame(text)
    return (b"R" + A, frame, [frame])


def test_what_is_kept_is_looked_at_again_in_order_until_it_is_not_added_any_more() -> None:
    """Not more often than is needed."""
    clock = Clock()
    contests = Contests(clock)
    assert not contests
    one, two = message(b"one"), message(b"two")
    contests.add(A, one)
    contests.add(A, two)
    assert contests
    assert contests.has(A)
    assert not contests.has(B)
    assert contests.take_due() == [one, two]
    assert not contests.has(A)
    contests.add(A, one)
    assert contests.take_due() == []
    clock.now += LOOK_S
    assert contests.take_due() == [one]
    clock.now += LOOK_S
    assert contests.take_due() == []
    assert not contests


def test_a_contest_that_lasts_for_too_long_is_over() -> None:
    """However often it is looked at."""
    clock = Clock()
    contests = Contests(clock)
    one = message(b"one")
    contests.add(A, one)
    end = clock.now + CONTEST_S
    while clock.now <= end:
        for again in contests.take_due():
            contests.add(A, again)
        assert contests.has(A)
        clock.now += LOOK_S
    assert contests.take_due() == []
    assert not contests


def test_what_is_kept_is_bounded() -> None:
    """Messages of a worker, their size, and workers."""
    contests = Contests(Clock())
    for number in range(MESSAGES_MAX + 5):
        contests.add(A, message(b"%d" % number))
    contests.add(B, message(bytes(MESSAGE_MAX_NBYTES + 1)))
    assert not contests.has(B)
    for number in range(CONTESTS_MAX + 5):
        contests.add(number.to_bytes(8, "big"), message(b"x"))
    assert len(contests.take_due()) == MESSAGES_MAX + CONTESTS_MAX - 2
