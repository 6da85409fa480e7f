"""Workers with keys of their own: what a member says under another's name is not read. Real sockets."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.keys import Keys
from tests.unit.transport.endpoints import LOOPBACK, Peer, peers
from tests.unit.transport.test_credentials import CONNECTED, REFUSED, Stranger, heard
from tests.waiting import until
from zrpc import finalizers
from zrpc.errors import PeerLostError
from zrpc.ids import new_incarnation
from zrpc.keyring import Keyring
from zrpc.secret import find_secret
from zrpc.transport import local_socket, sockets
from zrpc.transport.credentials import Credentials, make_pair
from zrpc.transport.hub import Hub
from zrpc.transport.hub_events import Control, Event, Hello
from zrpc.transport.identities import BROKER, RECEIVER, SENDER
from zrpc.transport.look import has_ended

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zrpc.ids import Incarnation

MINE = "tcp://127.0.0.1:1"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    made = sockets.make_context()
    yield made
    made.destroy(linger=0)


class GroupKey(Credentials):
    """Of one that knows the group's secret and the keyring, and has no key of its own."""

    def __init__(self, keys: Keys) -> None:
        super().__init__(find_secret())
        self._known = Keyring(keys.path)

    def set_connecting(self, sock: sockets.Socket, listener: Incarnation | None = None) -> None:
        super().set_connecting(sock)
        entry = None if listener is None else self._known.entry_of(listener)
        assert entry is not None
        sock.setsockopt(zmq.CURVE_SERVERKEY, entry.public.encode())


def connection(context: sockets.Context, to: Peer, credentials: Credentials, identity: bytes) -> closing[Stranger]:
    """A connection to a worker that is made with `credentials`, under `identity`, on which something is said."""
    return closing(Stranger(context, to.endpoint.address, credentials, identity, to.id))


def was_logged(text: str, caplog: pytest.LogCaptureFixture) -> int:
    """How often."""
    finalizers.run_pending()
    return caplog.text.count(text)


# ---- without a broker -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [False, True], ids=["tcp", "local"])
def test_workers_with_keys_of_their_own_talk(keys: Keys, monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    monkeypatch.setattr(Peer, "local", local)
    with peers(2, credentials=[keys.new("a"), keys.new("b")]) as (a, b):
        large = bytes(300_000)
        a.endpoint.send(b.id, [b"to b", large])
        b.endpoint.send(a.id, [b"to a"])
        ((source, frames),) = b.arrivals.wait_messages(1)
        assert (source, [bytes(frame) for frame in frames]) == (a.id, [b"to b", large])
        assert a.arrivals.wait_messages(1) == [(b.id, [b"to a"])]


@pytest.mark.parametrize("kind", ["not listed", "revoked", "the group's secret alone"])
def test_who_holds_no_valid_key_is_not_let_in(keys: Keys, context: sockets.Context, kind: str) -> None:
    """Though it knows the secret, and the public keys of all others."""
    worker_key = keys.new("worker")
    stranger: Credentials = keys.new("stranger") if kind == "revoked" else keys.credentials(make_pair())
    if kind == "the group's secret alone":
        stranger = GroupKey(keys)
    with peers(1, credentials=[worker_key]) as (worker,):
        if kind == "revoked":
            keys.revoke("stranger")
        with connection(context, worker, stranger, stranger.new_life()) as made:
            assert made.outcome() & REFUSED
            assert heard(worker) == []


def test_a_key_that_was_made_while_a_worker_runs_is_let_in(keys: Keys, context: sockets.Context) -> None:
    with peers(1, credentials=[keys.new("worker")]) as (worker,):
        newcomer = keys.new("newcomer")
        with connection(context, worker, newcomer, newcomer.new_life()) as made:
            assert made.outcome() == CONNECTED
            worker.arrivals.wait_messages(1)
            assert heard(worker) == [b"said by a stranger"]


@pytest.mark.parametrize("end", [b"", b"8 bytes."], ids=["its incarnation", "and more"])
def test_a_member_cannot_send_under_the_incarnation_of_another(
    keys: Keys, context: sockets.Context, caplog: pytest.LogCaptureFixture, end: bytes
) -> None:
    """It is let in by its own key. What the other one sends before and after arrives; it is logged once."""
    thief = keys.new("thief")
    with peers(2, credentials=[keys.new("victim"), keys.new("worker")]) as (victim, worker):
        victim.endpoint.send(worker.id, [b"before"])
        worker.arrivals.wait_messages(1)
        with connection(context, worker, thief, victim.id + end) as made:
            assert made.outcome() == CONNECTED
            made.sock.send(b"and again")
            text = f"what comes from {victim.id.hex()} over a connection of the key 'thief' is dropped"
            until(lambda: was_logged(text, caplog), "the forged message came")
            victim.endpoint.send(worker.id, [b"after"])
            worker.arrivals.wait_messages(2)
            made.sock.send(b"once more")
            assert heard(worker) == [b"before", b"after"]
        assert {source for source, _ in worker.arrivals.messages} == {victim.id, worker.id}
        assert was_logged(text, caplog) == 1


def test_a_life_that_is_not_known_yet_cannot_be_spoken_for_either(keys: Keys, context: sockets.Context) -> None:
    """What is kept back until a newcomer is known comes from the newcomer alone."""
    newcomer, thief = keys.new("newcomer"), keys.new("thief")
    with (
        peers(1, credentials=[keys.new("worker")]) as (worker,),
        connection(context, worker, thief, newcomer.new_life()) as forged,
        connection(context, worker, thief, thief.new_life()) as own,
    ):
        assert (forged.outcome(), own.outcome()) == (CONNECTED, CONNECTED)
        worker.arrivals.wait_messages(1)
        assert heard(worker) == [b"said by a stranger"]


def test_who_listens_at_the_address_of_another_is_told_nothing(keys: Keys) -> None:
    """A record or card may name any address; the incarnation says whose key must be there."""
    victim = keys.new("victim").new_life()
    with peers(2, credentials=[keys.new("worker"), keys.new("thief")]) as (worker, thief):
        worker.endpoint.connect(victim, thief.endpoint.address)
        worker.endpoint.send(victim, [b"for the victim"])
        worker.arrivals.wait_lost()
        with pytest.raises(PeerLostError):
            worker.endpoint.send(victim, [b"again"])
        assert heard(thief) == []


def test_a_worker_without_a_key_is_not_connected_to(keys: Keys) -> None:
    """A record may name an incarnation that is of no key."""
    with peers(1, credentials=[keys.new("worker")]) as (worker,):
        unknown = new_incarnation(b"\0\0\0")
        worker.endpoint.connect(unknown, LOOPBACK)
        with pytest.raises(PeerLostError, match="its key is not in the keyring"):
            worker.endpoint.send(unknown, [b"for nobody"])


@pytest.mark.parametrize("local", [False, True], ids=["tcp", "local"])
@pytest.mark.parametrize("speaks", [False, True], ids=["before it was sent to", "after it was sent to"])
def test_one_whose_key_is_revoked_is_lost_and_heard_no_more(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, local: bool, speaks: bool
) -> None:
    """While it runs, and does not know: its connections are there, and what it sends on them is dropped."""
    monkeypatch.setattr(Peer, "local", local)
    thief_key = keys.new("thief")
    with peers(2, credentials=[keys.new("worker"), thief_key]) as (worker, thief):
        thief.endpoint.send(worker.id, [b"before"])
        worker.arrivals.wait_messages(1)
        if speaks:
            worker.endpoint.send(thief.id, [b"to a member"])
            thief.arrivals.wait_messages(1)
        others = Keys(keys.folder / "kept")  # of an attacker that does not heed what is revoked
        keys.copy_to(others)
        keys.revoke("thief")
        ((lost, reason),) = worker.arrivals.wait_lost()
        assert lost == thief.id
        assert "its key 'thief' was revoked" in reason
        with pytest.raises(PeerLostError, match="was revoked"):
            worker.endpoint.send(thief.id, [b"more"])
        with peers(1, credentials=[others.credentials_of("thief")]) as (again,):
            again.knows(worker)
            with suppress(PeerLostError):  # its local link was closed by then
                again.endpoint.send(worker.id, [b"after"])
                again.arrivals.wait_lost()
            assert heard(worker) == [b"before"]


def test_what_an_open_connection_of_a_revoked_key_brings_is_dropped(keys: Keys, context: sockets.Context) -> None:
    """ZeroMQ has no means to close one connection of many."""
    member = keys.new("member")
    with (
        peers(1, credentials=[keys.new("worker")]) as (worker,),
        connection(context, worker, member, member.new_life()) as made,
    ):
        worker.arrivals.wait_messages(1)
        keys.revoke("member")
        assert not Keyring(keys.path).is_valid("")
        with connection(context, worker, member, member.new_life()) as second:  # by then the keyring was read again
            assert second.outcome() & REFUSED
        made.sock.send(b"after")
        with connection(context, worker, keys.new("other"), b"") as last:
            assert last.outcome() == CONNECTED
        assert heard(worker) == [b"said by a stranger"]


def test_what_a_local_link_brings_of_a_revoked_worker_is_dropped(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its link is there still; and it is refused a new one."""
    monkeypatch.setattr(Peer, "local", True)
    member = keys.new("member")
    life = member.new_life()
    with peers(1, credentials=[keys.new("worker")]) as (worker,):
        path = local_socket.path_in(local_socket.directory(), worker.id)
        hello = b"zrpc-local-1:" + life + member.local_proof(life, worker.id)
        worker.endpoint.connect(life, MINE)
        with closing(local_socket.connect(path)) as link:
            link.send(hello)
            keys.revoke("member")
            worker.arrivals.wait_lost()
            link.send(b"not read as a message")
            with closing(local_socket.connect(path)) as second:
                second.send(hello)
                second.setblocking(True)
                second.settimeout(20)
                assert second.recv(1) == b"", "it was closed"
            assert heard(worker) == []
    assert was_logged("a process of this user was refused: its key 'member' was revoked", caplog)


def test_a_worker_whose_own_key_is_revoked_loses_all_others(keys: Keys) -> None:
    """It would wait for answers that never come."""
    with peers(2, credentials=[keys.new("a"), keys.new("b")]) as (a, b):
        a.endpoint.send(b.id, [b"before"])
        b.arrivals.wait_messages(1)
        keys.revoke("a")
        ((lost, reason),) = a.arrivals.wait_lost()
        assert lost == b.id
        assert "this worker is a member no more" in reason


def test_who_listens_at_the_address_of_another_does_not_pass_for_it(keys: Keys) -> None:
    """Nor does it keep its name; one whose key was revoked keeps none either."""
    victim, looker = keys.new("victim"), keys.new("looker")
    life = victim.new_life()
    with peers(1, credentials=[keys.new("thief")]) as (thief,):
        assert has_ended(thief.endpoint.address, life, MINE, looker)
        assert not has_ended(thief.endpoint.address, thief.id, MINE, looker)
        assert heard(thief) == [], "a look says nothing"
        keys.revoke("thief")
        assert has_ended(thief.endpoint.address, thief.id, MINE, looker)


# ---- with a broker --------------------------------------------------------------------------------------------------


def pumped(hub: Hub, until_event: Event) -> list[Event]:
    """What the hub tells until that event."""
    events: list[Event] = []

    def has_come() -> bool:
        events.extend(hub.pump(10))
        return until_event in events

    until(has_come, "the last event came", lambda: events)
    return events


def test_a_hub_takes_nothing_under_the_incarnation_of_another(
    keys: Keys, context: sockets.Context, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a message to the broker, nor one to a worker, nor a greeting: that would bring the other's messages."""
    victim, thief = keys.new("victim"), keys.new("thief")
    life, own = victim.new_life(), thief.new_life()
    hub = Hub(LOOPBACK, keys.of_broker())
    made: list[sockets.Socket] = []

    def connected(credentials: Credentials, identity: bytes) -> sockets.Socket:
        sock = sockets.make_socket(context, zmq.DEALER, identity=identity)
        sockets.connect(sock, hub.address, credentials)
        made.append(sock)
        return sock

    try:
        hub.admit(life, 1)
        hub.admit(own, 1)
        connected(thief, RECEIVER + life).send(b"")
        forged = connected(thief, SENDER + life)
        forged.send_multipart([BROKER, b"as the victim"])
        forged.send_multipart([own, b"as the victim"])
        connected(thief, RECEIVER + own).send(b"")
        last = Control(own, [b"as itself"])
        text = f"what comes from {life.hex()} over a connection of the key 'thief' is dropped"
        until(lambda: hub.pump(10) is not None and was_logged(text, caplog), "what is forged came")
        connected(thief, SENDER + own).send_multipart([BROKER, b"as itself"])
        events = pumped(hub, last)
        assert [event for event in events if isinstance(event, Control)] == [last]
        assert Hello(life) not in events
        assert not hub.has_said_hello(life)
        assert life not in hub.take_active()
        assert was_logged(text, caplog) == 1
    finally:
        for sock in made:
            sock.close()
        hub.close()


def test_a_hub_relays_nothing_of_a_revoked_key(keys: Keys, context: sockets.Context) -> None:
    """On the connection that was there before."""
    member, other = keys.new("member"), keys.new("other")
    life, third = member.new_life(), other.new_life()
    hub = Hub(LOOPBACK, keys.of_broker())
    one = sockets.make_socket(context, zmq.DEALER, identity=SENDER + life)
    two = sockets.make_socket(context, zmq.DEALER, identity=SENDER + third)
    try:
        sockets.connect(one, hub.address, member)
        one.send_multipart([BROKER, b"before"])
        pumped(hub, Control(life, [b"before"]))
        keys.revoke("member")
        sockets.connect(two, hub.address, other)
        two.send_multipart([BROKER, b"first"])
        pumped(hub, Control(third, [b"first"]))  # the hub has asked the keyring about this connection
        one.send_multipart([BROKER, b"after"])
        assert not any(isinstance(event, Control) for event in hub.pump(200) + hub.pump(200))
    finally:
        one.close()
        two.close()
        hub.close()
