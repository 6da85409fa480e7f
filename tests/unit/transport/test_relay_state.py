"""How a worker stands to its broker."""

from __future__ import annotations

import pytest

from zrpc.errors import ProtocolError
from zrpc.transport.relay_state import Event, Relay, after


def test_a_connection_that_broke_is_up_again_once_the_group_is_together() -> None:
    state = Relay.FIRST
    seen = []
    for event in (Event.CONNECTED, Event.BROKE, Event.CONNECTED, Event.BROKE, Event.CONNECTED, Event.RESUMED):
        state = after(state, event)
        seen.append(state)
    assert seen == [Relay.UP, Relay.SEARCHING, Relay.ATTACHED, Relay.SEARCHING, Relay.ATTACHED, Relay.UP]


@pytest.mark.parametrize("event", list(Event))
def test_what_was_given_up_stays_so(event: Event) -> None:
    assert after(after(Relay.SEARCHING, Event.GIVEN_UP), event) is Relay.OVER


def test_an_event_that_cannot_be_is_named() -> None:
    with pytest.raises(ProtocolError, match="SEARCHING, and RESUMED cannot follow"):
        after(Relay.SEARCHING, Event.RESUMED)
