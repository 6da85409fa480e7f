"""A peer that does not read has a bounded number of bytes sent to it, and in the end it gets everything."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transport.endpoints import LOOPBACK, Arrivals
from zrpc.errors import OverloadedError, PeerLostError
from zrpc.ids import new_incarnation
from zrpc.transport.credit import COUNTED_MIN_NBYTES, Credit, CreditLink, Mark, answer_of, is_mark, total_of
from zrpc.transport.peer import CREDIT_NBYTES, PeerEndpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.wire.envelope import Buffer

CREDIT = 400

EVENTS = st.one_of(
    st.tuples(st.just("send"), st.integers(0, 700)),
    st.tuples(st.just("send"), st.integers(0, 100)),
    st.tuples(st.just("read"), st.integers(1, 9)),
    st.tuples(st.just("bring_back"), st.integers(1, 9)),
    st.tuples(st.just("lose_marks"), st.just(0)),
    st.tuples(st.just("repeat_mark"), st.just(0)),
)


class Road:
    """The credit of a peer, the way to a peer that reads when it is told to, and the way back."""

    def __init__(self) -> None:
        self.credit: Credit[tuple[int, int]] = Credit(CREDIT)
        self.there: deque[tuple[int, int] | Mark] = deque()
        self.back: deque[int] = deque()
        self.sent: list[tuple[int, int]] = []
        self.arrived: list[tuple[int, int]] = []
        self.last_mark = 0

    def send(self, nbytes: int) -> None:
        message = (len(self.sent), nbytes)
        self.sent.append(message)
        self.there += self.credit.send(message, nbytes)

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
            self.there += self.credit.confirm(self.last_mark)

    def lose_marks(self, _: int) -> None:
        """The connection breaks: marks on the way are gone. (That messages may be too is the callers' concern.)"""
        self.there = deque(step for step in self.there if not isinstance(step, Mark))
        self.back.clear()

    def repeat_mark(self, _: int) -> None:
        self.there += self.credit.confirm(self.last_mark)

    def check(self) -> None:
        on_the_way = [nbytes for step in self.there if not isinstance(step, Mark) for nbytes in step[1:]]
        assert sum(on_the_way) <= max(CREDIT, max(on_the_way, default=0))
        assert self.arrived == self.sent[: len(self.arrived)], "messages keep their order"
        waiting = self.sent[len(self.arrived) + len(on_the_way) :]
        assert self.credit.num_queued == len(waiting)
        assert self.credit.queued_nbytes == sum(nbytes for _, nbytes in waiting)

    def is_stuck(self) -> bool:
        return bool(self.credit.num_queued) and not self.there and not self.back


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
            for _ in range(road.credit.num_queued + 1):
                road.send(1)
        road.read(1000)
        road.bring_back(1000)
        road.check()
    assert road.arrived == road.sent


def test_a_confirmation_of_what_was_not_sent_changes_nothing() -> None:
    credit: Credit[str] = Credit(CREDIT)
    credit.send("first", 300)
    credit.confirm(10**9)
    assert credit.send("second", 300)[:1] == ["second"]
    assert "third" not in credit.send("third", 300)


def test_shutting_down_sends_what_waits() -> None:
    credit: Credit[str] = Credit(CREDIT)
    for name in ("first", "second", "third"):
        credit.send(name, 300)
    assert credit.release() == ["second", "third"]
    assert (credit.num_queued, credit.queued_nbytes) == (0, 0)


class Far:
    """The link below, whose other end reads when a test says so, and sends marks back."""

    takes_files = False
    queued_nbytes = 0

    def __init__(self) -> None:
        self.link = CreditLink(self, CREDIT * 1000)
        self.queue: deque[list[bytes]] = deque()
        self.back: deque[bytes] = deque()
        self.arrived: list[list[bytes]] = []
        self.flushed_s: list[float] = []
        self.is_closed = False
        self.errors: list[BaseException] = []
        """Raised by the next sends, the last one first."""

    def send(self, frames: Sequence[Buffer]) -> None:
        if self.is_closed:
            raise PeerLostError("it is not connected")
        if self.errors:
            raise self.errors.pop()
        self.queue.append([bytes(frame) for frame in frames])

    def flush(self, timeout_s: float) -> None:
        self.flushed_s.append(timeout_s)

    def close(self, linger_s: float) -> None:
        self.is_closed = True

    def read(self) -> None:
        while self.queue:
            frames = self.queue.popleft()
            if not is_mark(frames):
                self.arrived.append(frames)
            elif (answer := answer_of(frames)) is not None:
                self.back.append(answer)

    def bring_back(self) -> None:
        while self.back:
            answer = [self.back.popleft()]
            assert answer_of(answer) is None
            self.link.confirm(total_of(answer))

    def settle(self) -> None:
        while self.queue or self.back:
            self.read()
            self.bring_back()


LARGE = bytes(COUNTED_MIN_NBYTES + 1)


def test_messages_wait_for_a_peer_that_does_not_read_and_keep_their_order() -> None:
    far = Far()
    sent = []
    for number in range(100):
        frames = [str(number).encode(), LARGE] if number % 3 else [str(number).encode()]
        sent.append(frames)
        far.link.send(frames)
    on_the_way = sum(len(frame) for frames in far.queue for frame in frames)
    assert on_the_way <= CREDIT * 1000 + 100
    assert far.link.queued_nbytes > 0
    far.settle()
    assert far.arrived == sent
    assert far.link.queued_nbytes == 0


def test_a_large_single_frame_counts_too() -> None:
    far = Far()
    for _ in range(100):
        far.link.send([LARGE])
    assert far.link.queued_nbytes > 0
    far.settle()
    assert len(far.arrived) == 100


def test_who_sends_on_a_closed_link_is_told_and_a_mark_that_comes_late_does_no_harm() -> None:
    far = Far()
    for _ in range(100):
        far.link.send([b"x", LARGE])
    far.read()
    far.link.close(0.0)
    with pytest.raises(PeerLostError):
        far.link.send([b"x"])
    far.bring_back()
    assert not far.queue


def test_what_waited_is_sent_later_where_there_is_no_room_for_it() -> None:
    far = Far()
    names = [b"%d" % number for number in range(60)]
    for name in names:
        far.link.send([name, LARGE])
    assert far.link.queued_nbytes
    far.read()
    far.errors = [OverloadedError("no room")] * 100
    far.bring_back()  # marks came back, and what they let go cannot leave
    assert 0 < len(far.errors) < 100
    del far.errors[1:]
    with pytest.raises(OverloadedError):
        far.link.send([b"refused", LARGE])
    far.link.send([b"last", LARGE])
    far.settle()
    assert [frames[0] for frames in far.arrived] == [*names, b"last"]
    assert far.link.queued_nbytes == 0


def test_an_interrupt_loses_nothing_of_others() -> None:
    far = Far()
    for number in range(60):
        far.link.send([b"%d" % number, LARGE])
    far.read()
    far.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        far.bring_back()
    far.settle()
    far.link.send([b"last", LARGE])
    far.settle()
    arrived = [frames[0] for frames in far.arrived]
    assert len(arrived) == 60
    assert arrived[-1] == b"last", "all but the one that may have left"


def test_flushing_gives_everything_to_the_system() -> None:
    far = Far()
    for _ in range(100):
        far.link.send([b"x", LARGE])
    far.link.flush(7.0)
    assert sum(not is_mark(frames) for frames in far.queue) == 100
    assert far.flushed_s == [7.0]


def test_a_mark_of_a_worker_that_is_not_known_yet_goes_back_when_it_is() -> None:
    """Else what waits there would wait for ever."""
    ends = [PeerEndpoint(new_incarnation(), LOOPBACK) for _ in range(2)]
    sender, receiver = ends
    arrivals = Arrivals()
    try:
        sender.start(lambda *_: None, lambda *_: None)
        sender.connect(receiver.incarnation, receiver.address)
        for _ in range(4):
            sender.send(receiver.incarnation, [b"x", bytes(CREDIT_NBYTES // 4)])
        sender.send(receiver.incarnation, [b"last", LARGE])
        assert sender.queued_nbytes(receiver.incarnation) > 0
        receiver.start(arrivals.on_frames, arrivals.on_lost)
        arrivals.wait_messages(3)
        receiver.connect(sender.incarnation, sender.address)
        receiver.meet(sender.incarnation)
        assert arrivals.wait_messages(5)[-1][1][0] == b"last"
    finally:
        for end in ends:
            end.close(0.0)


@pytest.mark.parametrize(
    ("start", "is_one"), [(b"\xc1\x01", True), (b"\xc1\x02", True), (b"\xc1\x00", False), (b"\xc1\x03", False)]
)
def test_marks_are_of_two_kinds(start: bytes, is_one: bool) -> None:
    """Other frames of their length are something else, a short batch for example."""
    assert is_mark([start + bytes(8)]) is is_one
