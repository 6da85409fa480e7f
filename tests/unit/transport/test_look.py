"""Whether a worker has ended, as seen from outside."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, suppress

import pytest
import zmq

from tests.unit.transport.endpoints import CREDENTIALS, peers
from zrpc.ids import new_incarnation
from zrpc.transport import look
from zrpc.transport.look import has_ended
from zrpc.transport.peer import PeerEndpoint

MINE = "tcp://127.0.0.1:1"


@pytest.mark.parametrize("local", [False, True], ids=["tcp", "local"])
def test_a_worker_has_ended_when_its_endpoint_is_gone_and_not_before(local: bool) -> None:
    """It is seen by what says its incarnation: not by who listens at its address later."""
    life = new_incarnation()
    endpoint = PeerEndpoint(life, "tcp://127.0.0.1:0", local=local)
    address = endpoint.address
    assert not has_ended(address, life, MINE, None)
    assert not has_ended(address, life, MINE, None), "a look does it no harm"
    assert has_ended(address, new_incarnation(), MINE, None), "the one that listened here before has ended"
    endpoint.close(0.0)
    assert has_ended(address, life, MINE, None)


def test_a_worker_that_is_looked_at_goes_on() -> None:
    """Messages arrive before, during and after."""
    with peers() as (a, b):
        for number in range(20):
            assert not has_ended(b.endpoint.address, b.id, a.endpoint.address, CREDENTIALS)
            a.endpoint.send(b.id, [bytes([number])])
        assert [bytes(frames[0])[0] for _, frames in b.arrivals.wait_messages(20)] == list(range(20))


def test_an_address_that_this_worker_has_is_no_other_ones() -> None:
    """A worker that was started anew on a fixed port took it from its dead predecessor."""
    assert has_ended("tcp://127.0.0.1:5", new_incarnation(), "tcp://127.0.0.1:5", None)


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://no-such-host.invalid:5"])
def test_what_cannot_be_found_out_is_no_end(address: str) -> None:
    """Such a worker keeps its name."""
    assert not has_ended(address, new_incarnation(), MINE, None)


def test_an_address_of_another_host_is_not_looked_for_on_this_one() -> None:
    """A loopback address says nothing to a worker that others reach over the network."""
    assert not has_ended("tcp://127.0.0.1:1", new_incarnation(), "tcp://192.0.2.1:5", None)


def test_one_that_says_nothing_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that stands still."""
    monkeypatch.setattr(look, "LOOK_S", 0.05)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        assert not has_ended(f"tcp://127.0.0.1:{silent.getsockname()[1]}", new_incarnation(), MINE, None)


@pytest.mark.parametrize("kind", [zmq.PULL, zmq.ROUTER])
def test_another_zeromq_socket_at_its_address_is_not_taken_for_it(kind: int) -> None:
    """Whether or not it takes the connection of a worker."""
    with zmq.Context() as context, context.socket(kind) as other:
        port = other.bind_to_random_port("tcp://127.0.0.1")
        assert has_ended(f"tcp://127.0.0.1:{port}", new_incarnation(), MINE, None)


def test_another_program_at_its_address_is_not_taken_for_it() -> None:
    """It speaks another protocol."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer() -> None:
            for _ in range(2):  # it is looked at first whether anything listens
                with server.accept()[0] as connection, suppress(OSError):
                    connection.sendall(b"HTTP/1.1 400 Bad Request" + bytes(99))

        answering = threading.Thread(target=answer)
        answering.start()
        assert has_ended(f"tcp://127.0.0.1:{server.getsockname()[1]}", new_incarnation(), MINE, None)
        answering.join()
