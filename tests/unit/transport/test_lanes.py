"""Lanes: a peer that does not read has a bounded number of bytes sent to it, and in the end it gets everything."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zrpc.errors import OverloadedError, PeerLostError
from zrpc.transport.lanes import COUNTED_MIN_NBYTES, Lane, Lanes, Mark

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

CREDIT = 400
A, B = b"A" * 8, b"B" * 8

EVENTS = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 700)),
    st.tuples(st.just("send"), st.integers(0, 100)),
    st.tuples(st.just("read"), st.integers(1, 9)),
    st.tuples(st.just("bring_back"), st.integers(1, 9)),
    st.tuples(st.just("lose_marks"), st.just(0)),
    st.tuples(st.just("repeat_mark"), st.just(0)),
)


class Road:
    """A lane, the way to a peer that reads when it is told to, and the way back."""

    def __init__(self) -> None:
        self.lane: Lane[tuple[int, int]] = Lane(CREDIT)
        self.there: deque[tuple[int, int] | Mark] = deque()
        self.back: deque[int] = deque()
        self.sent: list[tuple[int, int]] = []
        self.arrived: list[tuple[int, int]] = []
        self.last_mark = 0

    def send(self, nbytes: int) -> None:
        message = (len(self.sent), nbytes)
        self.sent.append(message)
        self.there += self.lane.send(message, nbytes)

    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.there))):
            step = self.there.popleft()
            if isinstance(step, Mark):
                self.back.append(step.total)
            else:
                self.arrived.append(step)

    def bring_back(self, count: int) -> None:
        for _ in range(min(count, len(self.back))):
            self.last_mark = self.back.popleft()
            self.there += self.lane.confirm(self.last_mark)

    def lose_marks(self, _: int) -> None:
        """The connection breaks: marks on the way are gone. (That messages may be too is the callers' concern.)"""
        self.there = deque(step for step in self.there if not isinstance(step, Mark))
        self.back.clear()

    def repeat_mark(self, _: int) -> None:
        self.there += self.lane.confirm(self.last_mark)

    def check(self) -> None:
        on_the_way = [nbytes for step in self.there if not isinstance(step, Mark) for nbytes in step[1:]]
        assert sum(on_the_way) <= max(CREDIT, max(on_the_way, default=0))
        assert self.arrived == self.sent[: len(self.arrived)], "messages keep their order"
        waiting = self.sent[len(self.arrived) + len(on_the_way) :]
        assert self.lane.num_queued == len(waiting)
        assert self.lane.queued_nbytes == sum(nbytes for _, nbytes in waiting)

    def is_stuck(self) -> bool:
        return bool(self.lane.num_queued) and not self.there and not self.back


@settings(max_examples=500, deadline=None)
@given(st.lists(EVENTS, max_size=60))
def test_no_history_sends_more_than_the_credit_or_loses_a_message(history: list[tuple[str, int]]) -> None:
    road = Road()
    lost_marks = False
    for event, argument in history:
        getattr(road, event)(argument)
        road.check()
        lost_marks |= event == "lose_marks"
        assert lost_marks or not road.is_stuck(), "messages wait, and no mark is on its way that would let them go"
    for _ in range(2 * len(road.sent) + 2):  # what was lost is made good by further messages, if by nothing else
        if road.is_stuck():
            for _ in range(road.lane.num_queued + 1):
                road.send(1)
        road.read(1000)
        road.bring_back(1000)
        road.check()
    assert road.arrived == road.sent


def test_a_confirmation_of_what_was_not_sent_changes_nothing() -> None:
    lane: Lane[str] = Lane(CREDIT)
    lane.send("first", 300)
    lane.confirm(10**9)
    assert lane.send("second", 300)[:1] == ["second"]
    assert "third" not in lane.send("third", 300)


def test_shutting_down_sends_what_waits() -> None:
    lane: Lane[str] = Lane(CREDIT)
    for name in ("first", "second", "third"):
        lane.send(name, 300)
    assert lane.release() == ["second", "third"]
    assert (lane.num_queued, lane.queued_nbytes) == (0, 0)


class Wire:
    """What two workers' lanes sent each other, read when a test says so."""

    def __init__(self) -> None:
        self.lanes = {A: Lanes(self.sender(A), CREDIT * 1000), B: Lanes(self.sender(B), CREDIT * 1000)}
        self.queues: dict[Incarnation, deque[tuple[Incarnation, list[bytes]]]] = {A: deque(), B: deque()}
        self.arrived: list[list[bytes]] = []
        self.unknown: set[Incarnation] = set()
        self.errors: list[BaseException] = []
        """Raised by the next sends, the last one first."""

    def sender(self, source: Incarnation) -> Callable[[Incarnation, Sequence[Buffer]], None]:
        def send(to: Incarnation, frames: Sequence[Buffer]) -> None:
            if to in self.unknown:
                raise PeerLostError("it is not connected")
            if self.errors:
                raise self.errors.pop()
            self.queues[to].append((source, [bytes(frame) for frame in frames]))

        return send

    def read(self, reader: Incarnation) -> None:
        queue = self.queues[reader]
        while queue:
            source, frames = queue.popleft()
            if self.lanes[reader].is_mark(frames):
                self.lanes[reader].receive(source, frames)
            else:
                self.arrived.append(frames)

    def settle(self) -> None:
        while self.queues[A] or self.queues[B]:
            self.read(B)
            self.read(A)


LARGE = bytes(COUNTED_MIN_NBYTES + 1)


def test_messages_wait_for_a_peer_that_does_not_read_and_keep_their_order() -> None:
    wire = Wire()
    sent = []
    for number in range(100):
        frames = [str(number).encode(), LARGE] if number % 3 else [str(number).encode()]
        sent.append(frames)
        wire.lanes[A].send(B, frames)
    on_the_way = sum(len(frame) for _, frames in wire.queues[B] for frame in frames)
    assert on_the_way <= CREDIT * 1000 + 100
    assert wire.lanes[A].queued_nbytes(B) > 0
    wire.settle()
    assert wire.arrived == sent
    assert wire.lanes[A].queued_nbytes(B) == 0


def test_a_large_single_frame_counts_too() -> None:
    wire = Wire()
    for _ in range(100):
        wire.lanes[A].send(B, [LARGE])
    assert wire.lanes[A].queued_nbytes(B) > 0
    wire.settle()
    assert len(wire.arrived) == 100


def test_a_mark_of_a_worker_that_is_not_known_yet_goes_back_when_it_is() -> None:
    wire = Wire()
    wire.unknown.add(A)
    for _ in range(100):
        wire.lanes[A].send(B, [b"x", LARGE])
    wire.settle()
    assert len(wire.arrived) < 100
    wire.unknown.clear()
    wire.lanes[B].meet(A)
    wire.settle()
    assert len(wire.arrived) == 100


def test_what_waits_for_a_lost_peer_is_dropped() -> None:
    wire = Wire()
    for _ in range(100):
        wire.lanes[A].send(B, [b"x", LARGE])
    wire.lanes[A].forget(B)
    assert wire.lanes[A].queued_nbytes(B) == 0
    wire.unknown.add(B)
    with pytest.raises(PeerLostError):
        wire.lanes[A].send(B, [b"x", LARGE])


def test_what_waited_is_sent_later_where_there_is_no_room_for_it() -> None:
    wire = Wire()
    names = [b"%d" % number for number in range(60)]
    for name in names:
        wire.lanes[A].send(B, [name, LARGE])
    assert wire.lanes[A].queued_nbytes(B)
    wire.read(B)
    wire.errors = [OverloadedError("no room")] * 100
    wire.read(A)  # marks came back, and what they let go cannot leave
    assert 0 < len(wire.errors) < 100
    del wire.errors[1:]
    with pytest.raises(OverloadedError):
        wire.lanes[A].send(B, [b"refused", LARGE])
    wire.lanes[A].send(B, [b"last", LARGE])
    wire.settle()
    assert [frames[0] for frames in wire.arrived] == [*names, b"last"]
    assert wire.lanes[A].queued_nbytes(B) == 0


def test_an_interrupt_loses_nothing_of_others() -> None:
    wire = Wire()
    for number in range(60):
        wire.lanes[A].send(B, [b"%d" % number, LARGE])
    wire.read(B)
    wire.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        wire.read(A)
    wire.settle()
    wire.lanes[A].send(B, [b"last", LARGE])
    wire.settle()
    arrived = [frames[0] for frames in wire.arrived]
    assert len(arrived) == 60
    assert arrived[-1] == b"last", "all but the one that may have left"


def test_flushing_gives_everything_to_the_transport() -> None:
    wire = Wire()
    for _ in range(100):
        wire.lanes[A].send(B, [b"x", LARGE])
    wire.lanes[A].flush()
    assert sum(not wire.lanes[B].is_mark(frames) for _, frames in wire.queues[B]) == 100
