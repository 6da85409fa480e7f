"""The brokered transport of one worker, beside a socket in the broker's place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.waiting import until
from zrpc.errors import PeerLostError
from zrpc.ids import ENDED_MAX, new_incarnation
from zrpc.transport import sockets
from zrpc.transport.brokered import BrokeredEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 30.0
COUNT = 2_000
MESSAGE = bytes(10_000)
"""So many of them are more than fit into the system's buffers."""


@contextmanager
def full_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BrokeredEndpoint, zmq.Socket[bytes]]]:
    """An endpoint that has sent more than its broker takes, and the broker's socket."""
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 1)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as broker:
        broker.setsockopt(zmq.LINGER, 0)
        broker.setsockopt(zmq.RCVHWM, 1)
        port = broker.bind_to_random_port("tcp://127.0.0.1")
        endpoint = BrokeredEndpoint(f"tcp://127.0.0.1:{port}", new_incarnation())
        try:
            endpoint.open()
            until(endpoint.is_connected, "the endpoint is connected")
            peer = new_incarnation()
            endpoint.add_peer(peer)
            for number in range(COUNT):
                endpoint.send(peer, [number.to_bytes(4, "little"), MESSAGE])
            yield endpoint, broker
        finally:
            endpoint.close(0.0)


def test_what_is_queued_at_the_close_is_still_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker is slower than a worker that leaves: within the time to flush it gets all that was sent, in order."""
    with full_endpoint(monkeypatch) as (endpoint, broker), ThreadPoolExecutor() as pool:
        closing = pool.submit(endpoint.close, PATIENCE_S)
        numbers: list[int] = []
        while len(numbers) < COUNT and broker.poll(int(PATIENCE_S * 1000)):
            frames = broker.recv_multipart()
            if frames[-1] == MESSAGE:
                numbers.append(int.from_bytes(frames[-2], "little"))
        assert numbers == list(range(COUNT))
        closing.result(PATIENCE_S)


def test_what_no_broker_takes_is_given_up_at_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker reads nothing: the close ends when the time to flush is over."""
    with full_endpoint(monkeypatch) as (endpoint, _), ThreadPoolExecutor() as pool:
        pool.submit(endpoint.close, 0.2).result(PATIENCE_S)


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
