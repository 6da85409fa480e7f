"""How a worker stands to its broker. Pure: events in, states out.

What: a worker that was connected and is not any more looks for a broker, the same one or another of its list. Only when
that one has its group together again (`RESUMED`) may it send to others through it.
"""

from __future__ import annotations

from enum import Enum, auto

from zrpc.errors import ProtocolError


class Relay(Enum):
    FIRST = "the first connection is being made"
    UP = "connected"
    SEARCHING = "the connection broke, or there was none yet: a broker is looked for"
    ATTACHED = "connected again; the broker has not got the group together yet"
    OVER = "no broker was found in time, or it does not let this worker in"


class Event(Enum):
    CONNECTED = auto()
    BROKE = auto()
    RESUMED = auto()
    GIVEN_UP = auto()


_NEXT = {
    (Relay.FIRST, Event.CONNECTED): Relay.UP,
    (Relay.FIRST, Event.BROKE): Relay.SEARCHING,
    (Relay.UP, Event.BROKE): Relay.SEARCHING,
    (Relay.UP, Event.RESUMED): Relay.UP,
    (Relay.SEARCHING, Event.BROKE): Relay.SEARCHING,
    (Relay.SEARCHING, Event.CONNECTED): Relay.ATTACHED,
    (Relay.ATTACHED, Event.BROKE): Relay.SEARCHING,
    (Relay.ATTACHED, Event.RESUMED): Relay.UP,
    **dict.fromkeys([(state, Event.GIVEN_UP) for state in Relay], Relay.OVER),
    **dict.fromkeys([(Relay.OVER, event) for event in Event], Relay.OVER),
}


def after(state: Relay, event: Event) -> Relay:
    """The state that follows.

    Raises:
        ProtocolError: that event cannot come in this state.
    """
    try:
        return _NEXT[state, event]
    except KeyError:
        raise ProtocolError(f"the connection to the broker is {state.name}, and {event.name} cannot follow") from None
