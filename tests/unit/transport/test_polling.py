"""Waiting for messages: polling, giving up on it, and giving way. Real sockets; what a yield does is made up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import zmq

from zrpc.transport import polling
from zrpc.transport.polling import CALM_S, TAKEN_MAX_S, TAKEN_S, WINDOW_S, Polling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG_S = 5.0
"""So long is polled at most where a test wants it to find the message."""


class Clock:
    """In place of the module `time`: it goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Post:
    """A polling socket, and what happens when its reader yields."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.inbound = context.socket(zmq.PAIR)
        self.inbound.bind("inproc://post")
        self._outbound = context.socket(zmq.PAIR)
        self._outbound.connect("inproc://post")
        self.polling = Polling(self.inbound, None, LONG_S)
        self.num_yields = 0
        self.num_ways = 0
        self.on_yield: Callable[[], object] = self.send

    def send(self) -> None:
        self._outbound.send(b"x")

    def receive(self) -> None:
        assert self.polling.is_ready() or self.polling.wait(time.monotonic() + 10)
        self.inbound.recv()

    def yield_(self) -> None:
        self.num_yields += 1
        self.on_yield()

    def give_way(self) -> None:
        self.num_ways += 1

    def close(self) -> None:
        self.inbound.close()
        self._outbound.close()


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Iterator[Post]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Post(context)
    monkeypatch.setattr(polling, "let_others_run", made.yield_)
    monkeypatch.setattr(polling, "_yield_here", made.give_way)
    yield made
    made.close()
    context.term()


def test_who_polls_yields(post: Post) -> None:
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            post.send()

    post.on_yield = look
    post.receive()
    assert len(looks) == 3


def test_a_message_that_is_there_is_not_waited_for(post: Post) -> None:
    post.send()
    post.receive()
    assert not post.num_yields


def test_without_time_to_poll_nobody_does(post: Post) -> None:
    post.polling.busy_poll_s = 0.0
    assert not post.polling.wait(time.monotonic() + 0.01)
    assert not post.num_yields


def test_after_a_message_that_took_longer_nobody_polls_for_the_next(post: Post) -> None:
    post.polling.busy_poll_s = 1e-9
    post.on_yield = lambda: None
    assert not post.polling.wait(time.monotonic() + 0.01)
    assert post.num_yields == 1
    assert not post.polling.wait(time.monotonic() + 0.01)
    assert post.num_yields == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(polling, "time", made)
    return made


def take(post: Post, clock: Clock, took_s: float) -> None:
    """What a yield is where somebody else has the processor for so long."""
    clock.now += took_s
    post.send()


def wait_in_vain(post: Post, clock: Clock) -> int:
    """How often it is yielded while no message comes."""
    before = post.num_yields
    assert not post.polling.wait(clock.now + 0.01)
    return post.num_yields - before


def test_where_yields_take_long_nobody_polls_any_more(post: Post, clock: Clock) -> None:
    post.on_yield = lambda: take(post, clock, 0.3 * TAKEN_MAX_S)
    for _ in range(4):
        post.receive()
    assert post.num_yields == 4
    assert wait_in_vain(post, clock) == 0


def test_and_polls_again_after_a_while(post: Post, clock: Clock) -> None:
    post.on_yield = lambda: take(post, clock, 0.9 * TAKEN_MAX_S)
    for _ in range(4):
        post.receive()
    assert wait_in_vain(post, clock) == 0
    clock.now += 1.1 * CALM_S
    post.on_yield = lambda: take(post, clock, TAKEN_S)
    post.receive()
    assert post.num_yields == 5


def test_one_yield_tells_nothing_however_long_it_takes(post: Post, clock: Clock) -> None:
    for _ in range(10):
        post.on_yield = lambda: take(post, clock, 100 * TAKEN_MAX_S)
        post.receive()
    assert post.num_yields == 10


def test_a_few_long_yields_tell_nothing(post: Post, clock: Clock) -> None:
    for _ in range(10):
        post.on_yield = lambda: take(post, clock, 0.3 * TAKEN_MAX_S)
        for _ in range(3):
            post.receive()
        post.on_yield = lambda: take(post, clock, 0.5 * TAKEN_S)
        for _ in range(int(WINDOW_S / TAKEN_S) * 2):
            post.receive()
    polled = post.num_yields
    post.receive()
    assert post.num_yields == polled + 1


def test_one_way_is_given_for_each_message_that_was_polled_for(post: Post) -> None:
    post.polling.give_way()
    assert not post.num_ways
    post.receive()
    post.polling.give_way()
    post.polling.give_way()
    assert post.num_ways == 1
    post.send()
    post.receive()  # it was there: messages come in a series
    post.polling.give_way()
    assert post.num_ways == 1


def test_no_way_is_given_where_processors_are_short(post: Post, clock: Clock) -> None:
    post.on_yield = lambda: take(post, clock, 2 * TAKEN_S)
    post.receive()
    post.polling.give_way()
    assert not post.num_ways
