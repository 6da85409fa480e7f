"""Shortcuts: messages keep their order whichever way they go, nothing is lost, nobody else is let in."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from tests.unit.transport.endpoints import WAIT_S, Peer, check_order, mixed_message, peers
from tests.waiting import until
from zrpc.ids import new_incarnation
from zrpc.transport import descriptors, shortcuts, way
from zrpc.transport.inbox import SHORT_RUN, Inbox
from zrpc.transport.io_thread import IoThread
from zrpc.transport.outbox import send_frames
from zrpc.transport.shortcuts import MAX_NBYTES, Shortcut, Shortcuts, is_mark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are shortcuts on Linux only")


@contextmanager
def receiving() -> Iterator[tuple[Shortcuts, bytes]]:
    me = new_incarnation()
    made = Shortcuts(me)
    try:
        yield made, me
    finally:
        made.close()


def open_shortcut(me: bytes, peer: bytes, receiver: Shortcuts) -> Shortcut:
    """The sending end: it is welcome, and all that went around is read."""
    sender = Shortcut(me, peer)
    assert receiver.receive() is None
    receiver.send_back(sender.go_around(), me)
    return sender


@contextmanager
def pair() -> Iterator[tuple[Shortcut, Shortcuts, bytes]]:
    """Both ends, and who sends; it is welcome."""
    me = new_incarnation()
    with receiving() as (receiver, peer):
        sender = open_shortcut(me, peer, receiver)
        try:
            yield sender, receiver, me
        finally:
            sender.close()


def outbox_of(sender: Peer, to: Peer) -> Any:
    """What `sender` has toward a peer."""
    return sender.endpoint._outboxes[to.id]


def shortcut_of(sender: Peer, to: Peer) -> Any:
    """The shortcut that `sender` has toward a peer, once it has one."""
    return outbox_of(sender, to)._way._shortcut


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "local", True)
    monkeypatch.setattr(way, "SHORTCUT_AFTER", 1)


# ---- one shortcut ----------------------------------------------------------------------------------------------------


def test_messages_arrive_with_their_source() -> None:
    with pair() as (sender, receiver, me):
        assert sender.send([b"one"])
        assert sender.send([memoryview(bytes(MAX_NBYTES))])
        assert receiver.is_ready()
        assert receiver.receive() == (me, b"one")
        assert receiver.receive() == (me, bytes(MAX_NBYTES))
        assert receiver.receive() is None
        assert not receiver.is_ready()


def test_nothing_is_sent_before_it_is_welcome() -> None:
    me = new_incarnation()
    with receiving() as (receiver, peer):
        sender = Shortcut(me, peer)
        assert not sender.send([b"early"])
        assert receiver.receive() is None
        assert not sender.send([b"before"]), "what was sent before may not be read yet"
        receiver.send_back(sender.go_around(), me)
        assert sender.send([b"now"])
        assert receiver.receive() == (me, b"now")
        sender.close()


@pytest.mark.parametrize("frames", [[bytes(MAX_NBYTES + 1)], [b"head", b"body"], [], [b""]])
def test_other_messages_go_around(frames: list[Buffer]) -> None:
    with pair() as (sender, receiver, _):
        assert not sender.send(frames)
        assert receiver.receive() is None


def test_what_follows_a_message_that_went_around_does_so_too_until_its_mark_is_back() -> None:
    with pair() as (sender, receiver, me):
        first = sender.go_around()
        assert is_mark(first)
        assert not sender.send([b"behind"])
        second = sender.go_around()
        receiver.send_back(first, me)
        assert not sender.send([b"behind"]), "another message went around since"
        receiver.send_back(second, me)
        assert sender.send([b"after"])
        assert receiver.receive() == (me, b"after")


def test_marks_that_come_back_are_not_too_many() -> None:
    with pair() as (sender, receiver, me):
        for _ in range(10_000):
            receiver.send_back(sender.go_around(), me)
        assert sender.send([b"after"])


def test_a_receiver_that_is_late_gets_what_was_sent_and_the_rest_goes_around() -> None:
    with pair() as (sender, receiver, me):
        count = 0
        while sender.send([count.to_bytes(4, "little")]):
            count += 1
        assert count > 100
        mark = sender.go_around()
        for number in range(count):
            assert not sender.send([b"behind"])
            assert receiver.receive() == (me, number.to_bytes(4, "little"))
        assert receiver.receive() is None
        receiver.send_back(mark, me)
        assert sender.send([b"after"])


def test_a_receiver_that_is_gone_is_no_error() -> None:
    me = new_incarnation()
    with receiving() as (receiver, peer):
        sender = open_shortcut(me, peer, receiver)
    assert not sender.send([b"late"])
    assert not sender.send([b"later"])
    sender.go_around()
    assert not sender.send([b"later"])
    sender.close()
    assert Shortcut.make(me, peer) is None


def test_a_sender_that_is_gone_is_forgotten_when_all_it_sent_is_received() -> None:
    with pair() as (sender, receiver, me):
        assert sender.send([b"last"])
        receiver.send_back(sender.go_around(), me)  # unread at the close
        sender.close()
        assert not sender.send([b"later"])
        assert receiver.receive() == (me, b"last")
        assert receiver.receive() is None
        assert not receiver.is_ready()
        receiver.send_back(b"", me)
        assert receiver.receive_from(me) is None


def test_a_sender_that_is_gone_is_forgotten_though_a_forked_child_has_its_connection_too() -> None:
    me = new_incarnation()
    with receiving() as (receiver, peer):
        sender = open_shortcut(me, peer, receiver)
        another = open_shortcut(new_incarnation(), peer, receiver)
        child = os.fork()
        if not child:
            signal.pause()
        try:
            sender.close()
            assert receiver.receive() is None
            assert not receiver.is_ready(), "or the reader would turn in circles"
            assert another.send([b"x"])
            message = receiver.receive()
            assert message is not None
            assert message[1] == b"x"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            another.close()


def test_a_connection_that_is_half_let_go_is_let_go() -> None:
    """As if Ctrl-C had struck in between."""
    with pair() as (sender, receiver, me):
        sock, _ = receiver._connections.pop(receiver._by_source[me].fileno())
        assert sender.send([b"x"])
        assert receiver.receive() is None
        assert not receiver.is_ready()
        sock.close()


def test_nobody_waits_for_a_receiver_that_reads_no_more() -> None:
    with pair() as (sender, receiver, _):
        sender.go_around()
        assert sender.is_unread()
        receiver.close()
        assert not sender.is_unread()
        sender.wait_read(WAIT_S)


def test_of_one_who_is_gone_what_it_sent_is_received_and_no_more() -> None:
    with pair() as (sender, receiver, me):
        for number in range(3):
            assert sender.send([b"%d" % number])
        assert receiver.forget(me) == [b"0", b"1", b"2"]
        assert not sender.send([b"after"])
        assert receiver.receive() is None
        assert receiver.forget(me) == []


def test_senders_take_turns() -> None:
    names = [new_incarnation() for _ in range(3)]
    with receiving() as (receiver, peer):
        senders = [open_shortcut(name, peer, receiver) for name in names]
        for _ in range(10):
            for sender in senders:
                assert sender.send([b"x"])
        sources = [message[0] for _ in range(30) if (message := receiver.receive()) is not None]
        assert all(set(sources[at : at + 3]) == set(names) for at in range(0, 30, 3))
        for sender in senders:
            sender.close()


def test_other_users_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose process the other end is is the kernel's word; here this process takes itself for another's."""
    me, own = new_incarnation(), os.geteuid()
    with receiving() as (receiver, peer):
        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda: own + 1)
            assert Shortcut.make(me, peer) is None, "a sender does not send to another user's process"
        sender = Shortcut(me, peer)
        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda: own + 1)
            assert receiver.receive() is None
        assert not sender.send([b"unwanted"])
        assert receiver.receive() is None
        sender.close()


def test_where_all_strangers_look_the_same_nobody_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as the user that stands for all those whom it does not know."""
    me = new_incarnation()
    with receiving() as (receiver, peer):
        sender = Shortcut(me, peer)
        monkeypatch.setattr(shortcuts, "_nobody", os.geteuid)
        assert Shortcut.make(me, peer) is None
        assert receiver.receive() is None
        assert not receiver._connections
        sender.close()


def test_many_that_connect_at_once_do_not_keep_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "_ACCEPTED_MAX", 3)
    with pair() as (sender, receiver, me):
        strangers = [shortcuts.make_socket() for _ in range(10)]
        for stranger in strangers:
            stranger.connect(receiver._listener.getsockname())
        assert sender.send([b"x"])
        came = []
        for turn in range(10):
            message = receiver.receive()
            assert len(receiver._connections) <= 1 + 3 * (turn + 1)
            came += [message] if message else []
        assert came == [(me, b"x")]
        assert len(receiver._connections) == 11
        for stranger in strangers:
            stranger.close()
        assert receiver.receive() is None
        assert len(receiver._connections) == 1


def test_one_that_cannot_be_looked_at_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bool:
        raise OSError(1, "Operation not permitted")

    me = new_incarnation()
    with receiving() as (receiver, peer):
        sender = Shortcut(me, peer)
        with monkeypatch.context() as patched:
            patched.setattr(shortcuts, "_is_of_this_user", fail)
            assert receiver.receive() is None
            assert Shortcut.make(me, peer) is None
        assert not sender.send([b"x"])
        sender.close()


def test_who_is_thrifty_makes_and_takes_in_none_where_files_are_not_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    me, peer = new_incarnation(), new_incarnation()
    receiver = Shortcuts(peer, is_thrifty=True)
    before = descriptors.count_open()
    first = Shortcut.make_thriftily(me, peer)
    assert first is not None
    assert receiver.receive() is None
    receiver.send_back(first.go_around(), me)
    assert first.send([b"small"])
    assert receiver.receive() == (me, b"small")
    monkeypatch.setattr(descriptors, "are_plenty", lambda: False)
    assert Shortcut.make_thriftily(me, peer) is None
    second = Shortcut.make(new_incarnation(), peer)
    assert second is not None
    assert receiver.receive() is None
    assert not second.send([b"small"]), "it goes around"
    assert descriptors.count_open() == before + 2, "the ends of the first"
    assert first.send([b"small"]), "the ones that there are stay"
    assert receiver.receive() == (me, b"small")
    first.close()
    receiver.close()


def test_one_that_says_something_else_first_is_turned_away() -> None:
    with receiving() as (receiver, peer):
        sock = shortcuts.make_socket()
        sock.connect(shortcuts.address_of(peer))
        sock.send(b"GET / HTTP/1.0")
        assert receiver.receive() is None
        assert sock.recv(100) == b""
        sock.close()


def test_where_it_cannot_be_accepted_messages_go_around(monkeypatch: pytest.MonkeyPatch) -> None:
    me = new_incarnation()

    class Exhausted:
        def accept(self) -> Any:
            raise OSError(24, "Too many open files")

    with receiving() as (receiver, peer):
        sender = Shortcut(me, peer)
        with monkeypatch.context() as patched:
            patched.setattr(receiver, "_listener", Exhausted())
            assert receiver.receive() is None
        assert not receiver.is_ready(), "or the reader would turn in circles"
        assert not sender.send([b"early"])
        another = open_shortcut(new_incarnation(), peer, receiver)
        receiver.send_back(sender.go_around(), me)
        assert sender.send([b"now"])
        sender.close()
        another.close()


# ---- shortcuts and sockets together ----------------------------------------------------------------------------------


class Post:
    """An inbox that nobody reads but the test, a sender on both ways, and a stranger without a shortcut."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.me, self._peer = new_incarnation(), new_incarnation()
        router = context.socket(zmq.ROUTER)
        router.bind(f"inproc://{self._peer.hex()}")
        self.dealers = [context.socket(zmq.DEALER) for _ in range(2)]
        self.dealers[0].setsockopt(zmq.ROUTING_ID, self.me)
        for dealer in self.dealers:
            dealer.connect(f"inproc://{self._peer.hex()}")
        self.came: list[bytes] = []
        shortcuts = Shortcuts(self._peer)
        self.inbox = Inbox(router, self._take, lambda: False, IoThread("nobody"), lambda: None, shortcuts)
        self.shortcut = open_shortcut(self.me, self._peer, shortcuts)

    def _take(self, source: bytes, frames: list[Buffer]) -> None:
        self.came.append(bytes(frames[-1]))

    def read(self) -> None:
        """One message, if there is one."""
        count = len(self.came)
        awaited = SimpleNamespace(done=lambda: len(self.came) > count)
        self.inbox.wait_for(awaited, time.monotonic() + 0.01)


@pytest.fixture
def post() -> Iterator[Post]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Post(context)
    yield made
    made.inbox.close()
    made.shortcut.close()
    for dealer in made.dealers:
        dealer.close(0)
    context.term()


def test_what_was_sent_on_the_shortcut_is_read_before_what_went_around_after(post: Post) -> None:
    sent = [b"%d" % number for number in range(5 * SHORT_RUN)]
    for message in sent:
        assert post.shortcut.send([message])
    send_frames(post.dealers[0], [b"around"])
    while len(post.came) <= len(sent):
        post.read()
    assert post.came == [*sent, b"around"]


def test_shortcuts_do_not_keep_the_socket_waiting(post: Post) -> None:
    """The next message of the shortcut is always there."""
    send_frames(post.dealers[1], [b"around"])
    for number in range(3 * SHORT_RUN):
        assert post.shortcut.send([b"%d" % number])
        post.read()
    assert post.came.index(b"around") == SHORT_RUN


@pytest.mark.usefixtures("local")
def test_messages_keep_their_order_whichever_way_they_go() -> None:
    """Some are too large for a shortcut, some come in hundreds without a pause; several threads send."""
    num_threads, num_rounds, each = 4, 20, 150
    with peers() as (a, b):
        together = threading.Barrier(num_threads + 1)

        def send(thread: int) -> None:
            chance = random.Random(thread)
            for turn in range(num_rounds):
                together.wait(WAIT_S)
                for number in range(turn * each, (turn + 1) * each):
                    a.endpoint.send(b.id, mixed_message(thread, number, chance))

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(num_threads)]
        for one in threads:
            one.start()
        for turn in range(num_rounds):
            together.wait(WAIT_S)
            messages = b.arrivals.wait_messages((turn + 1) * num_threads * each)
        for one in threads:
            one.join()
        names = [bytes(frames[0]) for _, frames in messages]
        check_order(names, num_threads, num_rounds * each)
        shortcut = shortcut_of(a, b)
        assert shortcut is not None
        assert 0 < shortcut.num_around < len(names), "both ways were used"


@pytest.mark.usefixtures("local")
def test_marks_that_nobody_had_room_for_are_asked_for_again() -> None:
    """Thousands go around, and their sender does not look when they are read at last."""
    with peers() as (a, b):
        for _ in range(2):
            a.endpoint.send(b.id, [b"head", b"body"])
        b.arrivals.wait_messages(2)
        box = outbox_of(a, b)
        shortcut = shortcut_of(a, b)
        assert shortcut is not None
        until(lambda: not box.is_unread() and shortcut._confirmed == 2, "both are known to be read")
        with b.arrivals.stopped():
            for _ in range(1500):
                a.endpoint.send(b.id, [b"head", b"body"])
        b.arrivals.wait_messages(1502)
        assert box.is_unread()
        box.flush(WAIT_S)
        until(lambda: not box.is_unread(), "all that went around is known to be read")


@pytest.mark.parametrize("count", [1, way.SHORTCUT_AFTER + 10])
@pytest.mark.parametrize("is_local", [False, True])
def test_what_looks_like_a_mark_arrives_too(monkeypatch: pytest.MonkeyPatch, count: int, is_local: bool) -> None:
    monkeypatch.setattr(Peer, "local", is_local)
    frames: list[Buffer] = [b"head", shortcuts.mark_of(7)]
    with peers() as (a, b):
        for _ in range(count):
            a.endpoint.send(b.id, frames)
        assert [list(map(bytes, came)) for _, came in b.arrivals.wait_messages(count)] == [frames] * count


@pytest.mark.usefixtures("local")
def test_nobody_waits_for_a_mark_that_was_never_sent() -> None:
    """The message with which a shortcut is made went around without one."""
    with peers() as (a, b):
        a.endpoint.send(b.id, [b"x"])
        b.arrivals.wait_messages(1)
        box = outbox_of(a, b)
        until(box.is_unread, "the shortcut is welcome")
        box.flush(WAIT_S)
        until(lambda: not box.is_unread(), "all that went around is known to be read")


@pytest.mark.usefixtures("local")
def test_after_a_pause_messages_take_the_shortcut_again() -> None:
    with peers() as (a, b):
        a.endpoint.send(b.id, [b"first"])  # before it is welcome
        a.endpoint.send(b.id, [b"head", bytes(5000)])
        b.arrivals.wait_messages(2)
        shortcut = shortcut_of(a, b)
        assert shortcut is not None

        def takes_it() -> bool:
            before = shortcut.num_around
            a.endpoint.send(b.id, [b"small"])
            return shortcut.num_around == before

        until(takes_it, "a message takes the shortcut")


def test_workers_that_share_no_memory_have_none() -> None:
    with peers() as (a, b):
        a.endpoint.send(b.id, [b"hello"])
        b.arrivals.wait_messages(1)
        assert outbox_of(a, b)._way is None
        assert Shortcut.make(new_incarnation(), b.id) is None


def test_a_peer_that_is_seldom_sent_to_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "local", True)
    with peers() as (a, b):
        for _ in range(way.SHORTCUT_AFTER - 1):
            a.endpoint.send(b.id, [b"x"])
        assert shortcut_of(a, b) is None
        a.endpoint.send(b.id, [b"x"])
        assert shortcut_of(a, b) is not None
        b.arrivals.wait_messages(way.SHORTCUT_AFTER)


@pytest.mark.usefixtures("local")
def test_a_reader_that_sleeps_is_woken() -> None:
    with peers() as (a, b):
        for number in range(1, 6):
            threading.Event().wait(0.05)  # longer than anybody polls
            a.endpoint.send(b.id, [b"x"])
            assert len(b.arrivals.wait_messages(number)) == number
