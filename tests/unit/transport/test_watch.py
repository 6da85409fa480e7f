"""What a connection's events add up to."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import zmq
from hypothesis import given

from zrpc.transport import sockets
from zrpc.transport.watch import DENIALS, EVENTS, REFUSALS, ConnectionState, ConnectionWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTED = zmq.EVENT_CONNECTED
UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
BROKEN = zmq.EVENT_DISCONNECTED
REFUSED = zmq.EVENT_CLOSED
NO_DETAIL = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


def verdicts(events: list[int]) -> list[str | None]:
    state = ConnectionState()
    return [state.on_event(event, 5.0) for event in events]


@pytest.mark.parametrize(
    ("events", "is_denied"),
    [
        ([(CONNECTED, 0.0), (NO_DETAIL, 0.1)] * (DENIALS - 1), False),
        ([(CONNECTED, 0.0), (NO_DETAIL, 0.1)] * DENIALS, True),
        ([(CONNECTED, 0.0), (NO_DETAIL, 5.0)] * 10 * DENIALS, False),
        ([(CONNECTED, 0.0), (NO_DETAIL, 0.1), (CONNECTED, 1.0), (UP, 1.1)] * DENIALS, False),
        ([(CONNECTED, 0.0), (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, 0.1)], True),
        ([(CONNECTED, 0.0), (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 9.0)], True),
    ],
)
def test_handshakes_that_are_denied_are_told_from_those_that_take_long(
    events: list[tuple[int, float]], is_denied: bool
) -> None:
    """A process that stands still does not finish one, and is not lost for that."""
    state = ConnectionState()
    reasons = [reason for event, now in events if (reason := state.on_event(event, now))]
    assert bool(reasons) == is_denied
    assert all("has another secret" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("events", "verdict"),
    [
        ([CONNECTED, UP], None),
        ([CONNECTED, UP, BROKEN], None),
        ([CONNECTED, UP, BROKEN, REFUSED, REFUSED], None),
        ([CONNECTED, UP, BROKEN, REFUSED, REFUSED, REFUSED], "its connection broke and is refused"),
        ([CONNECTED, UP, BROKEN, REFUSED, REFUSED, CONNECTED, UP, BROKEN, REFUSED, REFUSED], None),
        ([REFUSED, REFUSED], None),
        ([REFUSED, REFUSED, REFUSED], "nobody listens at its address"),
        ([REFUSED, REFUSED, CONNECTED, REFUSED], "nobody listens at its address"),
        ([BROKEN] * 10, None),
    ],
)
def test_verdicts(events: list[int], verdict: str | None) -> None:
    *before, last = verdicts(events)
    assert last == verdict
    assert set(before) <= {None}


@given(st.lists(st.sampled_from([CONNECTED, UP, BROKEN, REFUSED])))
def test_a_peer_is_gone_after_refusals_in_a_row_and_never_else(events: list[int]) -> None:
    in_a_row, was_up = 0, False
    for event, verdict in zip(events, verdicts(events), strict=True):
        if event == UP:
            in_a_row, was_up = 0, True
        in_a_row += event == REFUSED
        gone = event == REFUSED and in_a_row >= REFUSALS
        expected = "its connection broke and is refused" if was_up else "nobody listens at its address"
        assert verdict == (expected if gone else None)


PATIENCE_S = 20.0


class Watching:
    """A watch, connections for it, and whom it found gone."""

    def __init__(self, made: ExitStack) -> None:
        self._made = made
        self.context = made.enter_context(sockets.make_context())
        self.inner, self.outer = self._socket(zmq.PAIR), self._socket(zmq.PAIR)
        self.inner.bind("inproc://wake")
        self.outer.connect("inproc://wake")
        self.watch: ConnectionWatch[int] = ConnectionWatch(self.inner)
        made.callback(self.watch.close)
        self.connections: dict[int, sockets.Socket] = {}
        self.gone: list[int] = []

    def listener(self) -> tuple[sockets.Socket, str]:
        router = self._socket(zmq.ROUTER)
        return router, sockets.bind(router, "tcp://127.0.0.1:0", None)

    def connect(self, key: int, address: str) -> sockets.Socket:
        """A connection and its monitor, which is not watched yet."""
        self.connections[key] = self._socket(zmq.DEALER)
        monitor = sockets.make_monitor(self.context, self.connections[key], EVENTS)
        sockets.connect(self.connections[key], address, None)
        return monitor

    def poll_until_gone(self, *keys: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while set(self.gone) != set(keys):
            assert time.monotonic() < deadline, self.gone
            self.watch.poll(100, self._on_gone)

    def _on_gone(self, key: int, _: str) -> None:
        self.gone.append(key)
        self.connections[key].close()

    def _socket(self, kind: int) -> sockets.Socket:
        return self._made.enter_context(sockets.make_socket(self.context, kind))


@pytest.fixture
def watching() -> Iterator[Watching]:
    with ExitStack() as made:
        yield Watching(made)


def test_those_whom_nobody_listens_for_are_gone_and_no_others(watching: Watching) -> None:
    listener, address = watching.listener()
    dead, nobody = watching.listener()
    dead.close()
    for key in range(20):
        watching.watch.add(key, watching.connect(key, nobody if key % 5 == 0 else address))
    watching.poll_until_gone(0, 5, 10, 15)
    listener.close()
    watching.poll_until_gone(*range(20))


def test_what_happened_before_a_connection_was_watched_is_seen(watching: Watching) -> None:
    dead, nobody = watching.listener()
    dead.close()
    monitor = watching.connect(1, nobody)
    assert monitor.poll(PATIENCE_S * 1000)
    watching.watch.add(1, monitor)
    watching.poll_until_gone(1)


def test_a_wake_ends_a_wait_without_end(watching: Watching) -> None:
    for _ in range(3):
        for _ in range(5):
            watching.outer.send(b"")
        watching.watch.poll(None, lambda *_: None)
    assert not watching.inner.poll(0), "wakes that came together are taken together"
