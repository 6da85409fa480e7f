"""What every link between two workers does, be it local, over TCP or through a broker."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.integration.broker_harness import TIMEOUT_S, Worker, running_broker
from tests.unit.transport.endpoints import CREDENTIALS, LOOPBACK, Arrivals
from tests.waiting import until
from zrpc.errors import AgentClosedError, PeerLostError
from zrpc.ids import new_incarnation
from zrpc.transport.brokered import BrokeredEndpoint
from zrpc.transport.peer import PeerEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.ids import Incarnation
    from zrpc.transport.link_endpoint import LinkEndpoint
    from zrpc.wire.envelope import Buffer

KINDS = ["local", "tcp", "relay"]
SIZES = [0, 1, 2, 100, 4_096, 4_097, 16_384, 65_535, 65_536, 65_537, 300_000, 3_000_000]


@dataclass
class End:
    """One worker's end of a link, and what came to it."""

    endpoint: LinkEndpoint
    arrivals: Arrivals
    leave: Callable[[], None] = lambda: None
    other: Incarnation = b""

    def send(self, *frames: Buffer) -> None:
        self.endpoint.send(self.other, frames)

    def close(self) -> None:
        """Leave the group, if there is a broker, and close."""
        self.leave()
        self.endpoint.close(flush_s=20.0)

    def received(self, count: int) -> list[list[bytes]]:
        """The first `count` messages, once they are there."""
        messages = self.arrivals.wait_messages(count)
        assert {source for source, _ in messages} == {self.other}
        return [[bytes(frame) for frame in frames] for _, frames in messages]


@contextmanager
def _peers(local: bool) -> Iterator[tuple[End, End]]:
    endpoints = [PeerEndpoint(new_incarnation(), LOOPBACK, local=local, credentials=CREDENTIALS) for _ in range(2)]
    ends = [End(endpoint, Arrivals()) for endpoint in endpoints]
    try:
        for end, endpoint, other in zip(ends, endpoints, reversed(endpoints), strict=True):
            end.other = other.incarnation
            endpoint.connect(other.incarnation, other.address)
            endpoint.start(end.arrivals.on_frames, end.arrivals.on_lost)
        yield ends[0], ends[1]
    finally:
        for endpoint in endpoints:
            endpoint.close(0.0)


@contextmanager
def _relayed() -> Iterator[tuple[End, End]]:
    with running_broker() as broker:
        workers = [Worker(broker.address, local=False) for _ in range(2)]
        try:
            threads = [threading.Thread(target=worker.join, args=(f"w{n}", 2)) for n, worker in enumerate(workers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            ends = [End(worker.endpoint, Arrivals(), partial(worker.group.leave, TIMEOUT_S)) for worker in workers]
            for end, worker, other in zip(ends, workers, reversed(workers), strict=True):
                end.other = other.incarnation
                worker.endpoint.start(end.arrivals.on_frames, end.arrivals.on_lost)
            yield ends[0], ends[1]
        finally:
            for worker in workers:
                worker.close()


@pytest.fixture(params=KINDS)
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    """Two workers that have exchanged nothing yet."""
    with ExitStack() as stack:
        yield stack.enter_context(_relayed() if request.param == "relay" else _peers(request.param == "local"))


def test_messages_of_every_size_come_whole_and_in_order(ends: tuple[End, End]) -> None:
    """In both directions at once."""
    sent = [[bytes([n % 251]) * nbytes, b"end"] for n, nbytes in enumerate(SIZES)]
    sent += [[b"x" * nbytes] for nbytes in SIZES[1:]]
    sent += [[b"many", *(bytes([n % 251]) * n for n in range(300))]]
    for message in sent:
        for end in ends:
            end.send(*message)
    for end in ends:
        assert end.received(len(sent)) == sent


def test_frames_may_begin_with_any_byte(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sent = [[bytes([first, second])] for first in (0x00, 0x92, 0xC0, 0xC1, 0xFF) for second in (0x00, 0x10, 0x12, 0xFF)]
    sent += [[bytes([first])] for first in (0x01, 0xC1)]
    for message in sent:
        sender.send(*message)
    assert receiver.received(len(sent)) == sent


def test_messages_of_several_threads_keep_the_order_of_each(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    num_threads, each = 4, 400

    def send(thread: int) -> None:
        chance = random.Random(thread)
        for number in range(each):
            rest = [bytes(chance.choice(SIZES[:10]))] if chance.random() < 0.1 else []
            sender.send(bytes([thread]) + number.to_bytes(4, "little"), *rest)

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(num_threads)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    names = [message[0] for message in receiver.received(num_threads * each)]
    for thread in range(num_threads):
        assert [int.from_bytes(name[1:], "little") for name in names if name[0] == thread] == list(range(each))


def test_what_a_worker_does_not_read_for_a_while_comes_in_order(ends: tuple[End, End]) -> None:
    """Far more than the system holds; who sends does not wait."""
    sender, receiver = ends
    count = 3_000
    with receiver.arrivals.stopped():
        for number in range(count):
            sender.send(number.to_bytes(4, "little"), bytes(20_000))
    assert [int.from_bytes(message[0], "little") for message in receiver.received(count)] == list(range(count))


def test_large_frames_are_aligned_and_may_be_written_to(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.send(b"name", bytes(20_001), bytes(300_000))
    ((_, (_, *large)),) = receiver.arrivals.wait_messages(1)
    for frame in large:
        view = memoryview(frame)
        assert not view.readonly
        view[-1] = 7


def test_files_go_with_messages_on_a_local_link_only(ends: tuple[End, End], request: pytest.FixtureRequest) -> None:
    expected = "[local]" in request.node.name
    assert [end.endpoint.takes_files(end.other) for end in ends] == [expected] * 2


def test_what_was_sent_before_the_sender_closed_comes(ends: tuple[End, End]) -> None:
    """Also from a sender that sends and closes at once."""
    sender, receiver = ends
    receiver.send(b"hello")
    sender.received(1)
    count = 500
    for number in range(count):
        sender.send(number.to_bytes(4, "little"), bytes(5_000))
    sender.close()
    assert [int.from_bytes(message[0], "little") for message in receiver.received(count)] == list(range(count))


def test_who_sends_to_a_worker_that_has_closed_is_told_once(ends: tuple[End, End]) -> None:
    sender, closes = ends
    sender.send(b"hello")
    closes.received(1)
    closes.endpoint.close(flush_s=1.0)
    ((peer, reason),) = sender.arrivals.wait_lost()
    assert peer == sender.other
    with pytest.raises(PeerLostError, match="the peer is gone: "):
        sender.send(b"too late")
    assert reason
    assert len(sender.arrivals.lost) == 1


def test_nothing_is_sent_to_an_unknown_worker_nor_by_one_that_has_closed(ends: tuple[End, End]) -> None:
    sender, _ = ends
    with pytest.raises(PeerLostError, match="it is not connected"):
        sender.endpoint.send(new_incarnation(), [b"x"])
    sender.endpoint.close(flush_s=0.0)
    with pytest.raises(AgentClosedError):
        sender.send(b"x")


def test_a_closed_end_leaves_no_thread_and_is_closed_again_without_harm(ends: tuple[End, End]) -> None:
    before = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("zrpc-reader") for name in before)
    for end in ends:
        end.send(b"x")
    for end in ends:
        end.endpoint.close(flush_s=1.0)
        end.endpoint.close(flush_s=1.0)
    until(lambda: not any(t.name.startswith("zrpc-reader") for t in threading.enumerate()), "the readers have ended")


def test_there_are_three_kinds() -> None:
    """The suite above is for all of them: a fourth is to be added to `KINDS`."""
    from zrpc.transport import local_link, socket_link

    links = [
        cls
        for module in (local_link, socket_link)
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "takes_files")
    ]
    assert len(links) == len(KINDS)
    assert issubclass(BrokeredEndpoint, PeerEndpoint.__mro__[1])
