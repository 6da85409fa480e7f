"""The brokered transport, as far as it needs no broker."""

from __future__ import annotations

import pytest

from zrpc.errors import PeerLostError
from zrpc.ids import ENDED_MAX, new_incarnation
from zrpc.transport.brokered import BrokeredEndpoint


def test_hundreds_of_departures_leave_a_bounded_memory() -> None:
    """A message to one of the last that left is refused with the reason; those before are as if they never came."""
    endpoint = BrokeredEndpoint("tcp://127.0.0.1:9", new_incarnation())
    try:
        lives = [number.to_bytes(8, "big") for number in range(1, ENDED_MAX + 300)]
        for life in lives:
            endpoint.add_peer(life)
            assert endpoint.remove_peer(life, "it left")
            assert not endpoint.remove_peer(life, "told again")
        with pytest.raises(PeerLostError, match="it left"):
            endpoint.send(lives[-1], [b"x"])
        with pytest.raises(PeerLostError, match="it is not connected"):
            endpoint.send(lives[0], [b"x"])
    finally:
        endpoint.close(0.0)
