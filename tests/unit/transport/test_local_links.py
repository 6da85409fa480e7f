"""Links between workers of one host: in order, whole, in both directions; what closes, breaks, or does not read."""

from __future__ import annotations

import gc
import logging
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transport.endpoints import (
    CREDENTIALS,
    LOOPBACK,
    WAIT_S,
    Arrivals,
    Peer,
    check_order,
    mixed_message,
    peers,
)
from zrpc import finalizers
from zrpc.errors import OverloadedError, PeerLostError
from zrpc.ids import new_incarnation
from zrpc.transport import descriptors, local_link, local_links, local_socket
from zrpc.transport.inbox import LOCAL_RUN, Inbox
from zrpc.transport.local_links import LocalLinks
from zrpc.transport.packets import MAX_NBYTES, Bundle, OwnedFile
from zrpc.transport.peer import PeerEndpoint
from zrpc.transport.socket_link import send_frames

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.local_link import LocalLink
    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are local links on Linux only")

SIZES = [0, 1, 100, 4096, 4097, MAX_NBYTES - 32, MAX_NBYTES, MAX_NBYTES + 1, 300_000]


@pytest.fixture(autouse=True)
def where(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the sockets, made for the test. Its path is short. Nothing is left in it."""
    with tempfile.TemporaryDirectory(prefix="z") as made:
        monkeypatch.setenv(local_socket.VARIABLE, made)
        yield Path(made)
        assert not list(Path(made).glob("zrpc-*")), "files of sockets are left"


class Worker:
    """Links of one worker, and what is told of them."""

    def __init__(self, *, is_thrifty: bool = False) -> None:
        self.id = new_incarnation()
        self.links = LocalLinks(self.id, is_thrifty=is_thrifty)
        self.links.tell(self._on_broken)
        self.broken: list[Incarnation] = []
        self.opened: list[LocalLink] = []

    def _on_broken(self, peer: Incarnation, reason: str) -> None:
        assert "closed the connection" in reason
        self.broken.append(peer)

    def connect(self, to: Incarnation) -> LocalLink:
        link = self.links.connect(to)
        assert link is not None
        self.opened.append(link)
        return link

    def receive(self, count: int) -> list[tuple[Incarnation, list[bytes]]]:
        """The next `count` messages, which are waited for."""
        came: list[tuple[Incarnation, list[bytes]]] = []
        poll = select.poll()
        poll.register(self.links.fileno(), select.POLLIN)
        while len(came) < count:
            message = self.links.receive()
            if message is not None:
                came.append((message[0], [bytes(frame) for frame in message[1]]))
            elif not self.links.is_ready():
                assert poll.poll(WAIT_S * 1000), f"{len(came)} messages came"
        return came

    def look(self) -> None:
        """Do what there is to do; there is no message."""
        while self.links.is_ready():
            assert self.links.receive() is None

    def close(self) -> None:
        for link in self.opened:
            link.close()
        self.links.close()


@contextmanager
def workers(count: int = 2) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Worker())) for _ in range(count)]


def frames_of(messages: Sequence[tuple[Incarnation, list[bytes]]]) -> list[list[bytes]]:
    return [frames for _, frames in messages]


def numbered(number: int, nbytes: int = 0) -> list[bytes]:
    return [number.to_bytes(4, "little") + bytes(nbytes)]


def fill(link: LocalLink, more: int, nbytes: int = 1000) -> int:
    """Send more messages than the kernel takes, and `more` after; how many there are."""
    count = (4 * local_socket.SEND_BUFFER_NBYTES) // (nbytes or 500) + more
    for number in range(count):
        link.send(numbered(number, nbytes))
    return count


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    finalizers.run_pending()
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- messages --------------------------------------------------------------------------------------------------------


def test_messages_arrive_with_their_source() -> None:
    """In both directions."""
    with workers() as (a, b):
        a.connect(b.id).send([b"there"])
        assert b.receive(1) == [(a.id, [b"there"])]
        b.connect(a.id).send([b"and", b"back"])
        assert a.receive(1) == [(b.id, [b"and", b"back"])]
        assert not a.links.is_ready()
        assert not b.links.is_ready()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from(SIZES) | st.integers(0, 200_000), min_size=1, max_size=4), max_size=60),
    st.integers(0, 1 << 30),
)
def test_messages_of_every_size_come_whole_and_in_order(sizes: list[list[int]], seed: int) -> None:
    """Some wait in the link, as they are more than the kernel holds."""
    chance = random.Random(seed)
    sent = [[chance.randbytes(nbytes) for nbytes in message] for message in sizes]
    with workers() as (a, b):
        link = a.connect(b.id)
        came: list[list[bytes]] = []
        for frames in sent:
            link.send(frames)
            if chance.random() < 0.3 and (message := b.links.receive()):
                came.append([bytes(frame) for frame in message[1]])
        while len(came) < len(sent):
            if message := b.links.receive():
                came.append([bytes(frame) for frame in message[1]])
            else:
                a.look()
        assert came == sent


def test_messages_of_several_threads_keep_their_order() -> None:
    """They share a link; a few are of many packets."""
    num_threads, each = 4, 1500
    with workers() as (a, b):
        link = a.connect(b.id)
        is_over = threading.Event()

        def send(thread: int) -> None:
            chance = random.Random(thread)
            for number in range(each):
                link.send(mixed_message(thread, number, chance))

        def drain() -> None:
            poll = select.poll()
            poll.register(a.links.fileno(), select.POLLIN)
            while not is_over.is_set():
                poll.poll(10)
                a.look()

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(num_threads)]
        threads.append(threading.Thread(target=drain))
        for one in threads:
            one.start()
        messages = b.receive(num_threads * each)
        is_over.set()
        for one in threads:
            one.join()
        check_order([frames[0] for _, frames in messages], num_threads, each)
        assert all(frames[1] in (b"two", bytes(200_000)) for _, frames in messages if len(frames) > 1)


def test_senders_take_turns() -> None:
    """None keeps the others waiting."""
    with workers(4) as (receiver, *senders):
        for sender in senders:
            link = sender.connect(receiver.id)
            for _ in range(10):
                link.send([b"x"])
        sources = [source for source, _ in receiver.receive(30)]
        assert all(set(sources[at : at + 3]) == {sender.id for sender in senders} for at in range(0, 30, 3))


def test_a_message_without_frames_does_no_harm() -> None:
    """What follows it comes."""
    with workers() as (a, b):
        link = a.connect(b.id)
        link.send([])
        link.send([b"next"])
        assert b.receive(1) == [(a.id, [b"next"])]


def test_a_worker_has_a_link_to_itself() -> None:
    """As to any other."""
    with workers(1) as (a,):
        a.connect(a.id).send([b"x", bytes(100_000)])
        assert a.receive(1) == [(a.id, [b"x", bytes(100_000)])]


def test_all_have_links_to_all() -> None:
    """Each message comes from the one who sent it."""
    with workers(6) as all_of_them:
        for one in all_of_them:
            for other in all_of_them:
                one.connect(other.id).send([one.id + other.id])
        for one in all_of_them:
            came = one.receive(6)
            assert sorted(source for source, _ in came) == sorted(other.id for other in all_of_them)
            assert all(frames == [source + one.id] for source, frames in came)


def test_files_come_with_their_message() -> None:
    """Also where it waits for room; they are open until then, and closed after."""
    with workers() as (a, b):
        before = descriptors.count_open()
        link = a.connect(b.id)
        count = fill(link, more=10)
        file = OwnedFile(os.memfd_create("zrpc-test"))
        os.pwrite(file.fd, b"content", 0)
        link.send(Bundle([b"x"], [file]))
        del file
        while count:
            if b.links.receive() is None:
                a.look()
            else:
                count -= 1
        a.look()
        message = b.links.receive()
        assert message is not None
        assert isinstance(message[1], Bundle)
        assert [os.pread(came.fd, 7, 0) for came in message[1].files] == [b"content"]
        del message
        gc.collect()
        assert descriptors.count_open() == (before or 0) + 2, "the two ends of the link"


# ---- a receiver that does not read -----------------------------------------------------------------------------------


def test_what_waits_for_a_late_receiver_leaves_in_order_when_it_reads() -> None:
    """The thread that reads at the sender sends it, when there is room again."""
    with workers() as (a, b):
        link = a.connect(b.id)
        count = fill(link, more=500)
        link.send([b"large", bytes(2_000_000)])
        link.send([b"last"])
        came: list[list[bytes]] = []
        while len(came) < count + 2:
            message = b.links.receive()
            if message is None:
                a.look()
            else:
                came.append([bytes(frame) for frame in message[1]])
        assert came == [*(numbered(number, 1000) for number in range(count)), [b"large", bytes(2_000_000)], [b"last"]]
        a.look()
        assert not a.links.is_ready()


def test_while_there_is_no_room_there_is_nothing_to_do() -> None:
    """Or the thread that reads would turn in circles. When there is room, it is woken."""
    with workers() as (a, b):
        link = a.connect(b.id)
        count = fill(link, more=100)
        poll = select.poll()
        poll.register(a.links.fileno(), select.POLLIN)
        came: list[list[bytes]] = []
        num_rounds = 0
        while len(came) < count:
            a.look()
            assert not a.links.is_ready()
            while message := b.links.receive():
                came.append([bytes(frame) for frame in message[1]])
            assert poll.poll(WAIT_S * 1000) or len(came) == count
            num_rounds += 1
        assert num_rounds > 1
        assert came == [numbered(number, 1000) for number in range(count)]
        a.look()
        assert not a.links.is_ready(), "nothing is left"
        link.send([b"after"])
        assert b.receive(1) == [(a.id, [b"after"])]


def test_a_late_receiver_keeps_no_other_one_waiting() -> None:
    """What is sent to others leaves at once."""
    with workers(3) as (a, late, other):
        fill(a.connect(late.id), more=100)
        a.connect(other.id).send([b"x"])
        assert other.receive(1) == [(a.id, [b"x"])]


def test_flushing_gives_what_waits_time_to_leave() -> None:
    """The receiver reads meanwhile; nothing else of the sender runs."""
    with workers() as (a, b):
        link = a.connect(b.id)
        count = fill(link, more=2_000)
        came: list[list[bytes]] = []
        reading = threading.Thread(target=lambda: came.extend(frames_of(b.receive(count))))
        reading.start()
        link.flush(WAIT_S)
        link.close()
        reading.join()
        assert came == [numbered(number, 1000) for number in range(count)]


@pytest.mark.parametrize("how", ["in vain", "nothing", "closed", "broken"])
def test_flushing_ends(how: str) -> None:
    """None reads, nothing waits, or either end is closed."""
    with workers() as (a, b):
        link = a.connect(b.id)
        if how != "nothing":
            fill(link, more=10)
        if how == "closed":
            link.close()
        if how == "broken":
            b.receive(1)
            b.close()
        link.flush(0.01 if how == "in vain" else WAIT_S)


@pytest.mark.parametrize(("limit", "value"), [("MAX_QUEUED", 10), ("MAX_QUEUED_NBYTES", 9_500)])
def test_too_much_that_waits_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    """What was taken before comes all the same, and when it has left more is taken."""
    with workers() as (a, b):
        link = a.connect(b.id)
        monkeypatch.setattr(local_link, limit, value)
        count = 0

        def send_many() -> None:
            nonlocal count
            while count < 1_000_000:
                link.send(numbered(count, 1000))
                count += 1

        with pytest.raises(OverloadedError, match=r"\d+ packets of \d+ bytes wait .* send fewer at once"):
            send_many()
        came: list[list[bytes]] = []
        while len(came) < count:
            message = b.links.receive()
            if message is None:
                a.look()
            else:
                came.append([bytes(frame) for frame in message[1]])
        assert came == [numbered(number, 1000) for number in range(count)]
        a.look()
        link.send([b"after"])
        assert b.receive(1) == [(a.id, [b"after"])]


def test_a_single_message_may_be_larger_than_what_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could never be sent."""
    monkeypatch.setattr(local_link, "MAX_QUEUED", 2)
    monkeypatch.setattr(local_link, "MAX_QUEUED_NBYTES", 1000)
    with workers() as (a, b):
        a.connect(b.id).send([bytes(5_000_000)])
        message = None
        while message is None:
            a.look()
            message = b.links.receive()
        assert bytes(message[1][0]) == bytes(5_000_000)


# ---- an end that closes ----------------------------------------------------------------------------------------------


def test_of_a_sender_that_has_closed_all_that_it_sent_is_received() -> None:
    """Then it is forgotten."""
    with workers() as (a, b):
        link = a.connect(b.id)
        for number in range(100):
            link.send(numbered(number))
        link.close()
        link.close()
        with pytest.raises(PeerLostError):
            link.send([b"late"])
        assert frames_of(b.receive(100)) == [numbered(number) for number in range(100)]
        b.look()
        assert not b.links.is_ready(), "or the reader would turn in circles"
        assert b.links.forget(a.id) == []


@pytest.mark.parametrize("is_taken_in", [False, True])
@pytest.mark.parametrize("is_read", [False, True])
def test_a_receiver_that_closes_is_told_of_once(is_taken_in: bool, is_read: bool) -> None:
    """Whether or not it took the connection in, and read what came."""
    with workers(3) as (a, b, c):
        link, other = a.connect(b.id), a.connect(c.id)
        link.send([b"x"])
        link.send([b"y"])
        if is_taken_in:
            b.receive(2 if is_read else 1)
        b.close()
        a.look()
        assert a.broken == [b.id]
        with pytest.raises(PeerLostError, match="the connection broke"):
            link.send([b"late"])
        link.close()
        a.look()
        assert not a.links.is_ready()
        assert a.broken == [b.id]
        other.send([b"x"])
        assert c.receive(1) == [(a.id, [b"x"])]


def test_a_receiver_that_closes_while_messages_wait_is_told_of() -> None:
    """What waits is let go of."""
    with workers() as (a, b):
        link = a.connect(b.id)
        count = fill(link, more=100)
        b.receive(1)
        b.close()
        a.look()
        assert a.broken == [b.id]
        assert count > 100


def test_an_end_that_was_closed_here_is_not_told_of() -> None:
    """Its owner knows."""
    with workers() as (a, b):
        a.connect(b.id).close()
        b.look()
        b.close()
        a.look()
        assert a.broken == []


def test_of_one_that_is_gone_what_it_has_sent_is_received_and_no_more() -> None:
    """Should it live after all, it sees that it is not heard."""
    with workers() as (a, b):
        link = a.connect(b.id)
        for frames in ([b"hello"], *([b"%d" % number] for number in range(3)), [b"two", bytes(100_000)]):
            link.send(frames)
        assert b.receive(1) == [(a.id, [b"hello"])]
        last = [[bytes(frame) for frame in frames] for frames in b.links.forget(a.id)]
        assert last == [[b"0"], [b"1"], [b"2"], [b"two", bytes(100_000)]]
        with pytest.raises(PeerLostError):
            link.send([b"after"])
        assert b.links.receive() is None
        assert b.links.forget(a.id) == []
        a.look()
        assert a.broken == [b.id]


@pytest.mark.parametrize("is_heard", [False, True])
def test_of_one_that_is_gone_what_it_has_sent_is_received_though_it_was_not_taken_in_yet(is_heard: bool) -> None:
    """It is reported as gone before its connection was looked at. Others are taken in meanwhile, and lose nothing."""
    with workers(3) as (a, b, c):
        if is_heard:
            c.connect(b.id).send([b"c"])
        link = a.connect(b.id)
        link.send([b"1"])
        link.send([b"2", bytes(100_000)])
        link.close()
        last = [[bytes(frame) for frame in frames] for frames in b.links.forget(a.id)]
        assert last == [[b"1"], [b"2", bytes(100_000)]]
        if is_heard:
            assert b.receive(1) == [(c.id, [b"c"])]
        assert b.links.forget(new_incarnation()) == []


def test_one_that_goes_on_sending_is_received_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives, and is not gone at all."""
    monkeypatch.setattr(local_links, "_LAST_MAX", 10)
    with workers() as (a, b):
        link = a.connect(b.id)
        for number in range(50):
            link.send(numbered(number))
        b.receive(1)
        assert b.links.forget(a.id) == [numbered(number) for number in range(1, 11)]


def test_a_worker_is_found_until_it_hides_or_closes(where: Path) -> None:
    """Its file is removed then. The links that there are stay, where it hides."""
    with workers() as (a, b):
        link = a.connect(b.id)
        assert local_socket.is_listening(b.id)
        assert len(list(where.iterdir())) == 2
        for _ in range(2):
            b.links.hide()
            assert len(list(where.iterdir())) == 1
            assert a.links.connect(b.id) is None
        link.send([b"x"])
        assert b.receive(1) == [(a.id, [b"x"])]
        a.links.close()
        assert not list(where.iterdir())
        assert a.links.connect(b.id) is None


def test_links_that_come_and_go_leave_no_files_open() -> None:
    """Neither end."""
    with workers() as (a, b):
        before = descriptors.count_open()
        for _ in range(20):
            link = a.connect(b.id)
            link.send([b"x"])
            b.receive(1)
            link.close()
            b.look()
        assert descriptors.count_open() == before


def test_one_that_is_let_go_of_is_not_looked_at_though_a_forked_child_has_its_connection_too() -> None:
    """Or the reader would turn in circles."""
    with workers(3) as (a, b, another):
        link, other = a.connect(b.id), another.connect(b.id)
        link.send([b"x"])
        b.receive(1)
        child = os.fork()
        if not child:
            signal.pause()
        try:
            b.links.forget(a.id)
            link.send([b"y"])
            assert b.links.receive() is None
            assert not b.links.is_ready()
            other.send([b"z"])
            assert b.receive(1) == [(another.id, [b"z"])]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


SENDING = """
import signal, sys
from zrpc.transport.local_links import LocalLinks
me, peer = map(bytes.fromhex, sys.argv[1:])
links = LocalLinks(me)
link = links.connect(peer)
for number in range(100):
    link.send([number.to_bytes(4, "little")])
print("sent", flush=True)
signal.pause()
"""


def test_a_process_that_is_killed_is_told_of_by_an_event(where: Path) -> None:
    """The kernel closes its end. What it has sent is there."""
    peer = new_incarnation()
    with workers(1) as (a,):
        command = [sys.executable, "-c", SENDING, peer.hex(), a.id.hex()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "sent\n"
                a.connect(peer)
            finally:
                process.kill()
        Path(local_socket.path_in(where, peer)).unlink()
        poll = select.poll()
        poll.register(a.links.fileno(), select.POLLIN)
        came: list[list[Buffer]] = []
        while not a.broken:
            assert poll.poll(WAIT_S * 1000)
            if message := a.links.receive():
                came.append(message[1])
        came += a.links.forget(peer)
        assert came == [numbered(number) for number in range(100)]
        assert a.broken == [peer]


# ---- who is let in ---------------------------------------------------------------------------------------------------


def test_other_users_are_not_let_in(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whose process the other end is is the kernel's word; here this process takes itself for another's."""
    own = os.geteuid()
    with workers() as (a, b):
        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda: own + 1)
            assert a.links.connect(b.id) is None, "a sender does not send to another user's process"
        b.look()
        link = a.connect(b.id)
        with monkeypatch.context() as patched:
            patched.setattr(os, "geteuid", lambda: own + 1)
            b.look()
        with pytest.raises(PeerLostError):
            link.send([b"unwanted"])
        assert b.links.receive() is None
        assert [text for text in logged(caplog) if "is reached over TCP" in text and f"user {own}" in text]


def test_where_all_strangers_look_the_same_none_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as the user that stands for all those whom it does not know."""
    with workers() as (a, b):
        link = a.connect(b.id)
        with monkeypatch.context() as patched:
            patched.setattr(local_socket, "_overflow_uid", os.geteuid)
            assert a.links.connect(b.id) is None
            b.look()
        with pytest.raises(PeerLostError):
            link.send([b"x"])
        finalizers.run_pending()


@pytest.mark.parametrize("first", [b"GET / HTTP/1.0", b"\xc1\x13", b"\xc1\x12", b"\xc1\x10"])
def test_one_that_says_something_else_first_is_turned_away(first: bytes) -> None:
    """Others are heard as before."""
    with workers() as (a, b):
        with closing(local_socket.connect(local_socket.path_in(local_socket.directory(), b.id))) as sock:
            sock.send(first)
            sock.send(first)
            a.connect(b.id).send([b"x"])
            assert b.receive(1) == [(a.id, [b"x"])]
            b.look()
            if first != b"\xc1\x10":  # which begins a message
                with suppress(ConnectionResetError):  # it had said more
                    assert sock.recv(100) == b""
        b.look()
        assert not b.links.is_ready()
        finalizers.run_pending()


def test_one_that_sends_what_is_no_packet_is_turned_away_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What it has sent before is received."""
    with workers() as (a, b):
        link = a.connect(b.id)
        link.send([b"before"])
        os.write(link.file, b"\xc1\x77")
        assert b.receive(1) == [(a.id, [b"before"])]
        b.look()
        with pytest.raises(PeerLostError):
            link.send([b"after"])
        assert [text for text in logged(caplog) if a.id.hex() in text and "could not be read" in text]


def test_many_that_connect_at_once_do_not_keep_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages come between them."""
    monkeypatch.setattr(local_links, "_ACCEPTED_MAX", 3)
    with workers() as (a, b), ExitStack() as stack:
        link = a.connect(b.id)
        link.send([b"first"])
        b.receive(1)
        before = descriptors.count_open() or 0
        path = local_socket.path_in(local_socket.directory(), b.id)
        for _ in range(10):
            stack.enter_context(closing(local_socket.connect(path)))
        link.send([b"x"])
        came = []
        for turn in range(20):
            message = b.links.receive()
            assert (descriptors.count_open() or 0) <= before + 10 + 3 * (turn + 1)
            came += [message[1]] if message else []
        assert came == [[b"x"]]
        assert descriptors.count_open() == before + 20, "all were taken in"
        stack.close()
        b.look()
        assert descriptors.count_open() == before


# ---- few files, and places that cannot be used -----------------------------------------------------------------------


def test_who_is_thrifty_makes_and_takes_in_none_where_files_are_not_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links that there are stay."""
    with closing(Worker(is_thrifty=True)) as a, closing(Worker(is_thrifty=True)) as b, closing(Worker()) as late:
        link = a.connect(b.id)
        link.send([b"x"])
        assert b.receive(1) == [(a.id, [b"x"])]
        monkeypatch.setattr(descriptors, "are_plenty", lambda: False)
        assert a.links.connect(b.id) is None
        late.connect(b.id).send([b"last"])
        assert b.receive(1) == [(late.id, [b"last"])], "it was taken in"
        assert late.links.connect(b.id) is None, "it is the last"
        link.send([b"y"])
        assert b.receive(1) == [(a.id, [b"y"])]


def test_a_connection_that_no_file_can_be_opened_for_is_taken_in_with_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it has sent is not lost, and meanwhile the reader does not turn in circles."""
    with workers(3) as (a, b, c):
        a.connect(b.id).send([b"x"])
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            assert b.links.receive() is None
            assert not b.links.is_ready()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert [text for text in logged(caplog) if "no file can be opened for it" in text]
        c.connect(b.id).send([b"y"])
        assert sorted(b.receive(2)) == sorted([(a.id, [b"x"]), (c.id, [b"y"])])


@pytest.mark.parametrize(
    "fault", ["missing", "file", "below a file", "not writable", "open to all", "long", "another's"]
)
def test_where_there_can_be_no_links_one_warning_names_what_to_set(
    fault: str, where: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The directory cannot be used; nothing is left open."""
    places = {"missing": "/proc/none/below", "long": str(where / ("x" * 90))}
    if fault in ("file", "below a file"):
        (where / "file").touch()
        places |= {"file": str(where / "file"), "below a file": str(where / "file" / "below")}
    if fault == "not writable" and os.geteuid() == 0:
        places[fault] = "/proc"  # where root cannot write either
    elif fault in ("not writable", "open to all"):
        where.chmod(0o777 if fault == "open to all" else 0o500)
    if fault == "another's":
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    monkeypatch.setenv(local_socket.VARIABLE, places.get(fault, str(where)))
    assert LocalLinks.make(new_incarnation()) is None
    (text,) = logged(caplog)
    assert "over TCP" in text
    assert local_socket.VARIABLE in text
    where.chmod(0o700)


def test_where_a_directory_is_missing_it_is_made(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those above it."""
    monkeypatch.setenv(local_socket.VARIABLE, str(where / "above" / "it"))
    with workers() as (a, b):
        a.connect(b.id).send([b"x"])
        assert b.receive(1) == [(a.id, [b"x"])]


def test_where_no_more_files_can_be_opened_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket was made, and the rest could not."""

    def fail() -> None:
        raise OSError(24, "Too many open files")

    before = descriptors.count_open()
    monkeypatch.setattr(select, "epoll", fail)
    assert LocalLinks.make(new_incarnation()) is None
    gc.collect()
    assert descriptors.count_open() == before


def test_a_directory_named_from_here_is_the_same_from_elsewhere(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program changes its working directory."""
    monkeypatch.chdir(where)
    monkeypatch.setenv(local_socket.VARIABLE, "below")
    with workers() as (a, b):
        monkeypatch.chdir("/")
        a.connect(b.id).send([b"x"])
        assert b.receive(1) == [(a.id, [b"x"])]
    assert not list((where / "below").iterdir())


# ---- endpoints -------------------------------------------------------------------------------------------------------


@contextmanager
def some_local(*are_local: bool) -> Iterator[list[Peer]]:
    """Endpoints that know each other and were started; of each whether it has links."""

    def make(is_local: bool) -> Peer:
        peer = Peer.__new__(Peer)
        peer.arrivals = Arrivals()
        peer.endpoint = PeerEndpoint(new_incarnation(), LOOPBACK, local=is_local, credentials=CREDENTIALS)
        peer.id = peer.endpoint.incarnation
        return peer

    with ExitStack() as stack:
        made = []
        for is_local in are_local:
            made.append(make(is_local))
            stack.callback(made[-1].endpoint.close, 0.0)
        for one in made:
            for other in made:
                one.knows(other)
            one.start()
        yield made


def talk(a: Peer, b: Peer) -> None:
    """Hundreds of messages each way, in order."""
    for number in range(300):
        a.endpoint.send(b.id, [number.to_bytes(4, "little"), bytes(number * 100)])
        b.endpoint.send(a.id, [number.to_bytes(4, "little"), bytes(number * 100)])
    for here, there in ((a, b), (b, a)):
        came = here.arrivals.wait_messages(300)
        assert {source for source, _ in came} == {there.id}
        assert [int.from_bytes(frames[0], "little") for _, frames in came] == list(range(300))
        here.arrivals.messages.clear()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_workers_with_and_without_links_talk_to_each_other(first: bool, second: bool) -> None:
    """Where one has none, both send over TCP to it and from it."""
    with some_local(first, second) as (a, b):
        talk(a, b)
        assert a.endpoint.takes_files(b.id) == (first and second)
        assert b.endpoint.takes_files(a.id) == (first and second)


def test_a_worker_whose_file_is_gone_is_reached_over_tcp(where: Path) -> None:
    """It was removed by something that cleans up; what that worker sends goes on its own link."""
    with some_local(True, True) as (a, b):
        Path(local_socket.path_in(where, b.id)).unlink()
        talk(a, b)
        assert not a.endpoint.takes_files(b.id)
        assert b.endpoint.takes_files(a.id)
        b.endpoint.close(0.0)
        assert [peer for peer, _ in a.arrivals.wait_lost()] == [b.id]


def test_where_the_file_goes_later_the_link_stays(where: Path) -> None:
    """It was made before."""
    with some_local(True, True) as (a, b):
        talk(a, b)
        for file in where.iterdir():
            file.unlink()
        talk(a, b)
        assert a.endpoint.takes_files(b.id)


def test_a_peer_is_lost_after_all_that_it_has_sent() -> None:
    """It closes at once, while the receiver does not read yet."""
    num_messages = 1_000
    order = close_after(num_messages, 100)
    assert order == [*range(num_messages), "lost"]


def test_a_peer_is_lost_after_all_that_had_to_wait_when_it_was_sent() -> None:
    """It closes, with time to flush, while the receiver does not read yet: more is sent than the kernel takes."""
    num_messages = 10_000
    order = close_after(num_messages, 1000)
    assert order == [*range(num_messages), "lost"]


def close_after(num_messages: int, nbytes: int) -> list[object]:
    """In which order messages, and the loss of their sender, come to one that reads only while the sender closes."""
    order: list[object] = []
    may_read, is_lost = threading.Event(), threading.Event()

    def on_frames(_: Incarnation, frames: list[Buffer]) -> None:
        assert may_read.wait(WAIT_S)
        order.append(int.from_bytes(frames[0][:4], "little"))

    def on_lost(_: Incarnation, reason: str) -> None:
        order.append("lost")
        is_lost.set()

    with some_local(True) as (a,), closing(_Endpoint()) as other:
        b = other.endpoint
        a.endpoint.connect(b.incarnation, b.address)
        b.connect(a.id, a.endpoint.address)
        b.start(on_frames, on_lost)
        b.watch(a.id)
        for number in range(num_messages):
            a.endpoint.send(b.incarnation, numbered(number, nbytes))
        closes = threading.Thread(target=a.endpoint.close, args=(WAIT_S,))
        closes.start()
        closes.join(0.3)  # it is in the middle of it
        may_read.set()
        closes.join()
        assert is_lost.wait(WAIT_S)
    return order


class _Endpoint:
    """One that has links, closed in the end."""

    def __init__(self) -> None:
        self.endpoint = PeerEndpoint(new_incarnation(), LOOPBACK, local=True, credentials=CREDENTIALS)

    def close(self) -> None:
        self.endpoint.close(0.0)


def test_a_peer_that_closes_is_noticed_though_a_forked_child_of_it_lives() -> None:
    """The child has let go of the connections."""
    with some_local(True, True) as (a, b):
        talk(a, b)
        child = os.fork()
        if not child:
            signal.pause()
        try:
            b.endpoint.close(0.0)
            assert [peer for peer, _ in a.arrivals.wait_lost()] == [b.id]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_messages_keep_their_order_where_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads send, some messages are large, and the receiver stands still now and then."""
    monkeypatch.setattr(Peer, "local", True)
    num_threads, num_rounds, each = 4, 10, 300
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
        check_order([bytes(frames[0]) for _, frames in messages], num_threads, num_rounds * each)
        b.arrivals.messages.clear()


def test_what_waits_at_the_close_is_still_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver begins to read only then."""
    monkeypatch.setattr(Peer, "local", True)
    with peers(start=False) as (a, b):
        a.start()
        for number in range(5_000):
            a.endpoint.send(b.id, numbered(number, 1000))
        closing_ = threading.Thread(target=a.endpoint.close, args=(WAIT_S,))
        closing_.start()
        b.start()
        came = [frames for _, frames in b.arrivals.wait_messages(5_000)]
        closing_.join()
        assert came == [numbered(number, 1000) for number in range(5_000)]


@pytest.mark.parametrize("busy_poll_s", [0.0, 0.001])
def test_a_reader_that_sleeps_is_woken(busy_poll_s: float) -> None:
    """Also one that has polled before."""
    with some_local(True, True) as (a, b):
        b.endpoint.inbox.polling.busy_poll_s = busy_poll_s
        for number in range(1, 6):
            threading.Event().wait(0.02)  # longer than it polls
            a.endpoint.send(b.id, [b"x"])
            assert len(b.arrivals.wait_messages(number)) == number


# ---- links and sockets together --------------------------------------------------------------------------------------


class Post:
    """An inbox that only the test reads, a sender on a link, and another one on the socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.sender, me = Worker(), new_incarnation()
        router = context.socket(zmq.ROUTER)
        router.bind(f"inproc://{me.hex()}")
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(f"inproc://{me.hex()}")
        self.came: list[bytes] = []
        self.inbox = Inbox(router, self._take, lambda: False, lambda: None, LocalLinks(me))
        self.link = self.sender.connect(me)

    def _take(self, source: bytes, frames: list[Buffer]) -> None:
        self.came.append(bytes(frames[-1]))

    def read(self) -> None:
        """One message, if there is one."""
        count = len(self.came)
        awaited: Any = SimpleNamespace(done=lambda: len(self.came) > count)
        self.inbox.wait_for(awaited, time.monotonic() + 0.01)


@pytest.fixture
def post() -> Iterator[Post]:
    with zmq.Context() as context:
        made = Post(context)
        yield made
        made.inbox.close()
        made.sender.close()
        made.dealer.close(0)


def test_links_do_not_keep_the_socket_waiting(post: Post) -> None:
    """The next message of the link is always there."""
    post.link.send([b"first"])
    post.read()
    send_frames(post.dealer, [b"socket"])
    for number in range(3 * LOCAL_RUN):
        post.link.send([b"%d" % number])
        post.read()
    assert post.came.index(b"socket") in (LOCAL_RUN, LOCAL_RUN - 1)


def test_the_socket_does_not_keep_links_waiting(post: Post) -> None:
    """They are read first."""
    for number in range(LOCAL_RUN):
        send_frames(post.dealer, [b"socket %d" % number])
        post.link.send([b"link %d" % number])
    while len(post.came) < 2 * LOCAL_RUN:
        post.read()
    assert post.came == [b"%s %d" % (way, n) for way in (b"link", b"socket") for n in range(LOCAL_RUN)]
