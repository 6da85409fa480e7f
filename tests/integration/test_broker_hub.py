"""The hub alone, with endpoints connected to it in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.integration.broker_harness import TIMEOUT_S
from tests.integration.harness import free_port
from tests.waiting import until
from zrpc.ids import Incarnation, new_incarnation
from zrpc.transport.brokered import BrokeredEndpoint
from zrpc.transport.hub import Hub
from zrpc.transport.hub_events import Control, Event, Hello, Hint, Question, Replaced, Undelivered, Unreachable
from zrpc.transport.identities import ASKER, BROKER, END_NBYTES, RECEIVER, SENDER
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Heartbeat, Register, Welcome
from zrpc_broker.server import Broker

if TYPE_CHECKING:
    from collections.abc import Iterator


class HubThread:
    """A hub pumped by a thread; its events are kept."""

    def __init__(self, backlog_max_nbytes: int) -> None:
        self.hub = Hub("tcp://127.0.0.1:0", None, backlog_max_nbytes)
        self.address = self.hub.address
        self.events: list[Event] = []
        self.commands: list[tuple[Incarnation, int]] = []
        self.tasks: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            events = self.hub.pump(1000)
            while self.commands:
                self.hub.admit(*self.commands.pop(0))
            while self.tasks:
                self.tasks.pop(0)()
            with self._changed:
                self.events += events
                self._changed.notify_all()
        self.hub.close()

    def wait(self, event: Event) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: event in self.events, TIMEOUT_S), self.events

    def wait_unreachable(self, peer: Incarnation) -> str:
        def reasons() -> list[str]:
            return [event.reason for event in self.events if isinstance(event, Unreachable) and event.peer == peer]

        with self._changed:
            assert self._changed.wait_for(reasons, TIMEOUT_S), self.events
        return reasons()[0]

    def close(self) -> None:
        self._stop = True
        self.hub.wake()
        self._thread.join()


@pytest.fixture
def hub() -> Iterator[HubThread]:
    started = HubThread(backlog_max_nbytes=1 << 20)
    yield started
    started.close()


@pytest.fixture
def endpoints(hub: HubThread) -> Iterator[list[BrokeredEndpoint]]:
    made = [BrokeredEndpoint(hub.address, new_incarnation()) for _ in range(2)]
    for endpoint in made:
        hub.wait(Hello(endpoint.incarnation))
        for other in made:
            endpoint.add_peer(other.incarnation)
    yield made
    for endpoint in made:
        endpoint.close(flush_s=0.0)


def test_what_is_for_the_broker_and_what_has_no_destination(hub: HubThread, endpoints: list[BrokeredEndpoint]) -> None:
    a, b = endpoints
    a.tell_broker([b"one", b"two"])
    a.send(b.incarnation, [b"x"])
    hub.wait(Control(a.incarnation, [b"one", b"two"]))
    hub.wait(Undelivered(a.incarnation, b.incarnation))


def test_a_worker_that_reads_nothing_is_given_up(hub: HubThread, endpoints: list[BrokeredEndpoint]) -> None:
    a, b = endpoints  # b is never opened: nobody reads for it
    a.open()
    hub.commands += [(a.incarnation, 1), (b.incarnation, 1)]
    hub.hub.wake()
    a.tell_broker([b"after admission"])
    hub.wait(Control(a.incarnation, [b"after admission"]))
    message = bytes(4000)
    for _ in range(40_000):
        a.send(b.incarnation, [message])
    assert "too slow" in hub.wait_unreachable(b.incarnation)


def test_a_connection_that_goes_is_hinted_at_and_found_by_a_message(
    hub: HubThread, endpoints: list[BrokeredEndpoint]
) -> None:
    a, b = endpoints
    hub.commands += [(a.incarnation, 1), (b.incarnation, 1)]
    hub.hub.wake()
    b.close(flush_s=0.0)
    hub.wait(Hint())  # of one of its two connections: the one that it receives on may go a moment later

    def is_found() -> bool:
        a.send(b.incarnation, [b"x"])
        return any(isinstance(event, Unreachable) for event in hub.events)

    until(is_found, "a message finds that it is gone")
    assert "gone" in hub.wait_unreachable(b.incarnation)


def test_a_broker_that_comes_late_was_not_silent_before() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    endpoint = BrokeredEndpoint(address, new_incarnation())
    try:
        endpoint.open()
        endpoint.heard_at = 0.0  # long ago
        began = time.monotonic()
        hub = Hub(address, None)
        try:
            until(endpoint.is_connected, "the endpoint is connected")
            assert endpoint.heard_at >= began
        finally:
            hub.close()
    finally:
        endpoint.close(flush_s=0.0)


def test_a_worker_that_registers_before_its_hello_is_not_probed_and_served_later() -> None:
    broker = Broker("tcp://127.0.0.1:0", credentials=None)
    serving = threading.Thread(target=broker.run)
    serving.start()
    incarnation = new_incarnation()
    with zmq.Context() as context, context.socket(zmq.DEALER) as sender, context.socket(zmq.DEALER) as receiver:
        try:
            sender.setsockopt(zmq.ROUTING_ID, SENDER + incarnation)
            sender.connect(broker.address)
            sender.send_multipart([BROKER, *encode(Envelope(Register("early", 0, 1, {}, "default"), 1))])
            sender.send_multipart([BROKER, *encode(Envelope(Heartbeat(), 0))])
            until(lambda: incarnation in broker._liveness.members(), "it is watched")
            other = BrokeredEndpoint(broker.address, new_incarnation())
            other.open()
            try:
                until(other.is_connected, "another worker is there")
            finally:
                other.close(flush_s=0.0)
            until(lambda: broker._liveness._probes, "everybody is to be probed, as some connection went")
            until(lambda: not broker._liveness._probes, "everybody was probed")
            receiver.setsockopt(zmq.ROUTING_ID, RECEIVER + incarnation)
            receiver.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
            receiver.connect(broker.address)
            receiver.send(b"")
            assert isinstance(decode(receiver.recv_multipart()[1:]).message, Welcome)
        finally:
            broker.stop()
            serving.join()


def test_what_is_not_from_a_worker_is_dropped_with_a_word(
    hub: HubThread, endpoints: list[BrokeredEndpoint], caplog: pytest.LogCaptureFixture
) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 1000)
        stranger.connect(hub.address)
        stranger.send_multipart([BROKER, b"x"])
        stranger.send(b"")
    endpoints[0].tell_broker([b"still served"])
    hub.wait(Control(endpoints[0].incarnation, [b"still served"]))
    assert "not from a zrpc worker" in caplog.text


@pytest.fixture
def connections(hub: HubThread) -> Iterator[Callable[[bytes, Incarnation, int], zmq.Socket[bytes]]]:
    """Makes one of the connections of a life: of a kind, and with a number."""
    with zmq.Context() as context, ExitStack() as stack:

        def connect(kind: bytes, life: Incarnation, number: int) -> zmq.Socket[bytes]:
            sock = stack.enter_context(context.socket(zmq.DEALER))
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
            sock.setsockopt(zmq.ROUTING_ID, kind + life + number.to_bytes(END_NBYTES, "big"))
            sock.connect(hub.address)
            return sock

        yield connect


Connect = Callable[[bytes, Incarnation, int], "zmq.Socket[bytes]"]


def test_a_question_is_answered_and_says_nothing_of_the_connection_of_who_asks(
    hub: HubThread, connections: Connect
) -> None:
    """A worker with several brokers asks all of them, and goes to one: it is not connected to the others."""
    life = new_incarnation()
    asking = connections(ASKER, life, 1)
    asking.send(b"where is my group?")
    asker = ASKER + life + (1).to_bytes(END_NBYTES, "big")
    hub.wait(Question(asker, [b"where is my group?"]))
    hub.tasks.append(lambda: hub.hub.answer(asker, [b"here"]))
    hub.hub.wake()
    assert asking.recv_multipart() == [BROKER, b"here"]
    assert Hello(life) not in hub.events
    assert not hub.hub.has_said_hello(life)


def test_what_an_older_connection_says_late_is_dropped(hub: HubThread, connections: Connect) -> None:
    """Its hello does not take the newer one's place, and its messages are not of this worker any more."""
    life, last = new_incarnation(), new_incarnation()
    newer = connections(RECEIVER, life, 2)
    newer.send(b"")
    hub.wait(Hello(life))
    connections(RECEIVER, life, 1).send(b"")
    connections(SENDER, life, 1).send_multipart([BROKER, b"late"])
    connections(SENDER, life, 2).send_multipart([BROKER, b"in time"])
    hub.wait(Control(life, [b"in time"]))
    connections(SENDER, last, 1).send_multipart([BROKER, b"last"])
    hub.wait(Control(last, [b"last"]))
    hub.tasks.append(lambda: hub.hub.send(life, [b"answer"]))
    hub.hub.wake()
    assert newer.recv_multipart() == [BROKER, b"answer"]
    assert hub.events.count(Hello(life)) == 1
    assert Control(life, [b"late"]) not in hub.events


@pytest.mark.parametrize("first_heard", [RECEIVER, SENDER])
def test_a_newer_connection_counts_once_the_older_one_is_gone(
    hub: HubThread, connections: Connect, first_heard: bytes
) -> None:
    """Whichever of its two sockets is heard first: all that it has said is taken then, in order."""
    life = new_incarnation()
    older = connections(RECEIVER, life, 1)
    older.send(b"")
    hub.wait(Hello(life))
    if first_heard == RECEIVER:
        newer = connections(RECEIVER, life, 2)
        newer.send(b"")
    sender = connections(SENDER, life, 2)
    sender.send_multipart([BROKER, b"again"])
    until(lambda: older.poll(10) and older.recv_multipart() == [BROKER, b""], "the hub looks whether it is there")
    assert Replaced(life) not in hub.events
    older.close()
    hub.wait(Control(life, [b"again"]))
    sender.send_multipart([BROKER, b"more"])
    hub.wait(Control(life, [b"more"]))
    if first_heard == SENDER:
        assert not hub.hub.has_said_hello(life), "it cannot be answered before its hello"
        newer = connections(RECEIVER, life, 2)
        newer.send(b"")
    until(lambda: hub.hub.has_said_hello(life), "it said hello")
    hub.tasks.append(lambda: hub.hub.send(life, [b"answer"]))
    hub.hub.wake()
    assert newer.recv_multipart() == [BROKER, b"answer"]
    assert hub.events.count(Replaced(life)) == 1
    assert hub.events.index(Replaced(life)) < hub.events.index(Control(life, [b"again"]))


def test_a_connection_of_another_process_does_not_take_the_place_of_a_workers(
    hub: HubThread, connections: Connect
) -> None:
    """One that knows the group's secret says that it is that worker: nothing is sent to it, or taken of it."""
    life, other = new_incarnation(), new_incarnation()
    receiver, sender = connections(RECEIVER, life, 1), connections(SENDER, life, 1)
    receiver.send(b"")
    hub.wait(Hello(life))
    thief, forged = connections(RECEIVER, life, 9), connections(SENDER, life, 9)
    thief.send(b"")
    forged.send_multipart([BROKER, b"forged"])
    forged.send_multipart([other, b"forged"])
    until(lambda: receiver.poll(10) and receiver.recv_multipart() == [BROKER, b""], "the hub asks")
    sender.send_multipart([BROKER, b"genuine"])
    hub.wait(Control(life, [b"genuine"]))
    hub.tasks.append(lambda: hub.hub.send(life, [b"answer"]))
    hub.hub.wake()
    until(lambda: receiver.recv_multipart() == [BROKER, b"answer"], "it is answered")
    assert not thief.poll(0)
    assert Control(life, [b"forged"]) not in hub.events
    assert Replaced(life) not in hub.events
    assert Undelivered(life, other) not in hub.events


def test_a_worker_that_was_forgotten_is_answered_on_the_connection_it_has(hub: HubThread, connections: Connect) -> None:
    """It was taken for lost, and does not know it."""
    life = new_incarnation()
    receiver, sender = connections(RECEIVER, life, 3), connections(SENDER, life, 3)
    receiver.send(b"")
    hub.wait(Hello(life))
    hub.tasks.append(lambda: hub.hub.forget(life))
    hub.hub.wake()
    until(lambda: not hub.hub.has_said_hello(life), "it is forgotten")
    sender.send_multipart([BROKER, b"I am here"])
    hub.wait(Control(life, [b"I am here"]))
    hub.tasks.append(lambda: hub.hub.send(life, [b"you are lost"]))
    hub.hub.wake()
    assert receiver.recv_multipart() == [BROKER, b"you are lost"]


def test_what_is_sent_to_a_worker_that_is_to_come_back_is_kept_for_it(hub: HubThread, connections: Connect) -> None:
    """It is told first what the broker says, also where its first connection does not last."""
    life, other = new_incarnation(), new_incarnation()
    connections(RECEIVER, other, 0).send(b"")
    hub.wait(Hello(other))
    hub.tasks += [lambda: hub.hub.admit(other, 1), lambda: hub.hub.expect(life, 1)]
    hub.hub.wake()
    sender = connections(SENDER, other, 0)
    until(lambda: not hub.tasks, "it is expected")
    for text in (b"one", b"two"):
        sender.send_multipart([life, text])
    sender.send_multipart([BROKER, b"sent"])
    hub.wait(Control(other, [b"sent"]))
    first = connections(RECEIVER, life, 1)
    first.send(b"")
    hub.wait(Hello(life))
    first.close()
    last = connections(RECEIVER, life, 2)
    last.send(b"")
    until(lambda: hub.events.count(Hello(life)) == 2, "it is connected again")
    hub.tasks += [
        lambda: hub.hub.admit(life, 1),
        lambda: hub.hub.send(life, [b"welcome"]),
        lambda: hub.hub.release(life),
    ]
    hub.hub.wake()
    assert [last.recv_multipart() for _ in range(3)] == [[BROKER, b"welcome"], [other, b"one"], [other, b"two"]]
    assert Replaced(life) not in hub.events
    assert Undelivered(other, life) not in hub.events


def test_a_worker_that_is_to_come_back_has_no_more_kept_than_others(hub: HubThread, connections: Connect) -> None:
    """Then it is given up, and who sends to it learns of that."""
    life, other = new_incarnation(), new_incarnation()
    connections(RECEIVER, other, 0).send(b"")
    hub.wait(Hello(other))
    hub.tasks += [lambda: hub.hub.admit(other, 1), lambda: hub.hub.expect(life, 1)]
    hub.hub.wake()
    sender = connections(SENDER, other, 0)
    until(lambda: not hub.tasks, "it is expected")
    for _ in range(20):
        sender.send_multipart([life, bytes(100_000)])
    assert "it is not back: more than 1 MiB wait for it" in hub.wait_unreachable(life)
    hub.wait(Undelivered(other, life))
