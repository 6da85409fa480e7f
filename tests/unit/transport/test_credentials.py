"""Who is let in: strangers can connect, and nothing that they say is read. Real sockets."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest
import zmq
from zmq.utils import z85

from tests.unit.transport.endpoints import CREDENTIALS, LOOPBACK, Arrivals, Peer, peers
from tests.waiting import until
from zrpc import finalizers
from zrpc.errors import PeerLostError
from zrpc.ids import new_incarnation
from zrpc.secret import Secret
from zrpc.transport import local_socket, sockets
from zrpc.transport.credentials import Credentials
from zrpc.transport.peer import PeerEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.ids import Incarnation

OTHER = Credentials(Secret("the secret of another group"))
CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Stranger:
    """A DEALER that has said something to an address, and what became of its connection."""

    def __init__(
        self, context: sockets.Context, address: str, credentials: Credentials | None, identity: bytes = b"",
        listener: Incarnation | None = None,
    ) -> None:  # fmt: skip
        self.sock = sockets.make_socket(context, zmq.DEALER, identity=identity or new_incarnation())
        self.monitor = sockets.make_monitor(context, self.sock, CONNECTED | REFUSED)
        sockets.connect(self.sock, address, credentials, listener)
        self.sock.send(b"said by a stranger")

    def outcome(self) -> int:
        """The first event of its connection."""
        assert self.monitor.poll(10_000)
        return sockets.receive_event(self.monitor)

    def close(self) -> None:
        self.sock.disable_monitor()
        self.monitor.close()
        self.sock.close()


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    made = sockets.make_context()
    yield made
    made.destroy(linger=0)


def heard(peer: Peer) -> list[bytes]:
    """What came to `peer` before something that it says to itself."""
    peer.endpoint.connect(peer.id, peer.endpoint.address)
    peer.endpoint.send(peer.id, [b"the last"])
    until(lambda: any(frames[0] == b"the last" for _, frames in peer.arrivals.messages), "the last message came")
    return [bytes(frames[0]) for _, frames in peer.arrivals.messages if frames[0] != b"the last"]


class KnowsOneKey(Credentials):
    """Of somebody who has seen the public key of those that listen, and has a key of his own."""

    def set_connecting(self, sock: sockets.Socket, listener: Incarnation | None = None) -> None:
        CREDENTIALS.set_connecting(sock, listener)
        public, private = zmq.curve_keypair()
        sock.setsockopt(zmq.CURVE_PUBLICKEY, public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, private)


@pytest.mark.parametrize(
    "credentials", [None, OTHER, KnowsOneKey(Secret("a key of his own"))], ids=["none", "another-secret", "another-key"]
)
def test_what_a_stranger_says_is_not_read(context: sockets.Context, credentials: Credentials | None) -> None:
    with peers(1) as (worker,), closing(Stranger(context, worker.endpoint.address, credentials)) as stranger:
        assert stranger.outcome() & REFUSED
        assert heard(worker) == []


def test_what_a_member_says_is_read(context: sockets.Context) -> None:
    """The same connection, with the secret: what refuses strangers does not refuse all."""
    with peers(1) as (worker,), closing(Stranger(context, worker.endpoint.address, CREDENTIALS)) as member:
        assert member.outcome() == CONNECTED
        worker.arrivals.wait_messages(1)
        assert heard(worker) == [b"said by a stranger"]


@pytest.mark.parametrize("listens", [None, OTHER], ids=["none", "another-secret"])
def test_a_worker_says_nothing_to_whoever_listens_without_the_secret(listens: Credentials | None) -> None:
    """It might have the address of a worker that died; the caller is told in words."""
    arrivals = Arrivals()
    other = PeerEndpoint(new_incarnation(), LOOPBACK, credentials=listens)
    with peers(1) as (worker,):
        try:
            other.start(arrivals.on_frames, arrivals.on_lost)
            worker.endpoint.connect(other.incarnation, other.address)
            worker.endpoint.send(other.incarnation, [b"for a member"])
            ((lost, reason),) = worker.arrivals.wait_lost()
            assert lost == other.incarnation
            assert "has another secret than this process, or none" in reason
            with pytest.raises(PeerLostError, match="another secret"):
                worker.endpoint.send(other.incarnation, [b"again"])
            assert arrivals.messages == []
        finally:
            other.close(0.0)


def test_a_process_of_the_same_user_without_the_secret_is_refused_on_the_local_link(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever incarnation it claims."""
    monkeypatch.setattr(Peer, "local", True)
    with peers() as (worker, other):
        path = local_socket.path_in(local_socket.directory(), worker.id)
        hellos = [
            b"zrpc-local-1:" + other.id,
            b"zrpc-local-1:" + other.id + bytes(32),
            b"zrpc-local-1:" + other.id + OTHER.local_proof(other.id, worker.id),
            b"zrpc-local-1:" + other.id + CREDENTIALS.local_proof(other.id, new_incarnation()),
            b"zrpc-local-1:" + new_incarnation() + CREDENTIALS.local_proof(other.id, worker.id),
        ]
        for hello in hellos:
            with closing(local_socket.connect(path)) as stranger:
                stranger.send(hello)
                with suppress(OSError):
                    stranger.send(b"said by a stranger")
                stranger.setblocking(True)
                stranger.settimeout(10)
                with suppress(ConnectionResetError):  # it was closed, with what was not read
                    assert stranger.recv(1) == b"", "it was closed"
        other.endpoint.send(worker.id, [b"said by a member"])
        worker.arrivals.wait_messages(1)
        assert [bytes(frames[0]) for _, frames in worker.arrivals.messages] == [b"said by a member"]
    finalizers.run_pending()
    assert "no member of this group was refused" in caplog.text


def test_what_is_derived_of_one_secret_fits_itself_alone() -> None:
    """And is not said by `repr`."""
    same = Credentials(Secret("a secret of these endpoints"))
    a, b = new_incarnation(), new_incarnation()
    assert same.local_proof(a, b) == CREDENTIALS.local_proof(a, b)
    assert len({CREDENTIALS.local_proof(a, b), CREDENTIALS.local_proof(b, a), OTHER.local_proof(a, b)}) == 3
    public, _ = zmq.curve_keypair()
    assert not CREDENTIALS.is_member(z85.decode(public))
    assert "a secret of these endpoints" not in repr(vars(CREDENTIALS))


def test_ten_half_open_connections_keep_nobody_out() -> None:
    """They have said nothing, or half of a greeting."""
    with peers(1) as (worker,):
        host, port = sockets.split_address(worker.endpoint.address)
        silent = [socket.create_connection((host, port)) for _ in range(10)]
        try:
            for sock in silent[::2]:
                sock.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
            assert heard(worker) == []
        finally:
            for sock in silent:
                sock.close()
