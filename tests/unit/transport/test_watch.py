"""What a connection's events add up to."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import zmq
from hypothesis import given

from zrpc.transport.watch import REFUSALS, ConnectionState

CONNECTED = zmq.EVENT_CONNECTED
UP = zmq.EVENT_HANDSHAKE_SUCCEEDED
BROKEN = zmq.EVENT_DISCONNECTED
REFUSED = zmq.EVENT_CLOSED


def verdicts(events: list[int]) -> list[str | None]:
    state = ConnectionState()
    return [state.on_event(event) for event in events]


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
