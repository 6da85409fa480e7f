"""A join that is turned down says why, whenever that becomes known: before the join begins, or while it waits."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgpack
import pytest

from tests.integration.broker_harness import TIMEOUT_S, Broker, Worker, running_broker, workers
from tests.waiting import until
from zrpc.errors import PeerLostError, ProtocolError, RefusedError, RendezvousError, ZrpcError
from zrpc.secret import find_secret
from zrpc.transport.credentials import Credentials
from zrpc.transport.hub import Hub
from zrpc.transport.hub_events import Control
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.wire.envelope import Buffer

MOMENTS = ["before the join", "while it waits"]
ADDRESSES = [1, 2]
"""How many brokers the worker knows of: with one it connects by itself, with several it looks for one."""


def is_over(worker: Worker) -> bool:
    """Whether its transport has given up the broker."""
    try:
        worker.endpoint.tell_broker(encode(Envelope(Heartbeat(), 0)))
    except PeerLostError:
        return True
    except ZrpcError:
        pass
    return False


def listed(broker: Broker, count: int) -> list[str]:
    """The broker's address, and others where nothing listens."""
    return [broker.address, "tcp://127.0.0.1:9"][:count]


@pytest.mark.parametrize("count", ADDRESSES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_broker_with_another_secret_refuses_the_worker(moment: str, count: int) -> None:
    """Its text says what to do."""
    with running_broker(ZRPC_SECRET="the secret of another group") as broker:
        worker = Worker(listed(broker, count))
        try:
            if moment == MOMENTS[0]:
                worker.start()
                until(lambda: is_over(worker), "it is refused")
            with pytest.raises(RefusedError, match="another secret"):
                worker.join("a", None)
            with pytest.raises(RefusedError, match="another secret"):
                worker.join("a", None)
        finally:
            worker.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_broker_that_dies_and_is_not_started_again_is_lost(moment: str) -> None:
    """It was there when the worker connected."""
    with running_broker() as broker:
        worker = Worker(broker.address, grace_s=0.5)
        try:
            worker.start()
            until(worker.endpoint.is_connected, "it is connected")
            if moment == MOMENTS[0]:
                broker.kill()
                until(lambda: is_over(worker), "the broker is given up")
            else:
                threading.Timer(0.0, broker.kill).start()
            with pytest.raises(RendezvousError, match=r"the connection to the broker broke|no broker could be reached"):
                worker.join("a", 2)
        finally:
            worker.close()


def test_a_broker_with_another_secret_in_the_place_of_one_that_died_is_named_as_one() -> None:
    """The members look for another one for a while, as a broker that is about to die breaks connections off as well."""
    with running_broker() as broker, workers(broker.address, "a", "b", grace_s=4.0, local=False) as (a, b):
        broker.kill()
        with running_broker(bind=broker.address, ZRPC_SECRET="the secret of another group"):
            a.seen.wait(lambda: b.incarnation in dict(a.seen.lost), timeout_s=60.0)
            assert "none that lets this worker in" in dict(a.seen.lost)[b.incarnation]
            assert "another secret" in dict(a.seen.lost)[b.incarnation]


@pytest.mark.parametrize("count", ADDRESSES)
def test_a_name_that_is_taken_is_said_on_each_attempt(count: int) -> None:
    """The member that has it goes on."""
    with running_broker() as broker, workers(broker.address, "a", world_size=None) as (a,):
        other = Worker(listed(broker, count))
        try:
            for _ in range(2):
                with pytest.raises(RefusedError, match="name a is not unique"):
                    other.join("a", None)
        finally:
            other.close()
        a.endpoint.send(a.incarnation, [b"still here"])
        a.seen.wait(lambda: len(a.seen.frames) == 1)


def test_a_worker_that_has_left_is_told_that_it_has() -> None:
    """Nothing turned it down."""
    with running_broker() as broker, workers(broker.address, "a", world_size=None) as (a,):
        a.group.leave(TIMEOUT_S)
        with pytest.raises(ProtocolError, match=r"'a' cannot join group 'default' again: it is left"):
            a.join("a", None)


@contextmanager
def broker_that_answers(answer: Callable[[list[Buffer]], list[Buffer]]) -> Iterator[str]:
    """A broker that answers each message in its own way; its address."""
    hub = Hub("tcp://127.0.0.1:0", Credentials(find_secret()))
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            for event in hub.pump(50):
                if isinstance(event, Control):
                    hub.send(event.source, answer(event.frames))
        hub.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield hub.address
    finally:
        stopping.set()
        hub.wake()
        thread.join()


def of_the_next_version(frames: list[Buffer]) -> list[Buffer]:
    """The same message, as a later version would send it."""
    version, *rest = msgpack.unpackb(frames[0])
    return [msgpack.packb([version + 1, *rest]), *frames[1:]]


def test_a_broker_of_another_version_is_named_as_one() -> None:
    """What it says cannot be read."""
    with broker_that_answers(of_the_next_version) as address:
        worker = Worker(address)
        try:
            with pytest.raises(ProtocolError, match="version"):
                worker.join("a", None)
            with pytest.raises(ProtocolError, match="version"):
                worker.join("a", None)
        finally:
            worker.close()


def test_a_worker_says_who_it_is_first_and_once_on_a_connection() -> None:
    """Also where it looks for newcomers while it connects: a broker takes who says anything else for a stranger."""
    heard: list[str] = []

    def answer(frames: list[Buffer]) -> list[Buffer]:
        heard.append(type(decode(frames).message).__name__)
        return list(encode(Envelope(Heartbeat(), 0)))

    with broker_that_answers(answer) as address:
        worker = Worker([address, "tcp://127.0.0.1:9"])
        stopping = threading.Event()

        def refresh() -> None:
            while not stopping.is_set():
                worker.group.refresh()

        worker.start()
        thread = threading.Thread(target=refresh)
        thread.start()
        try:
            with pytest.raises(RendezvousError):
                worker.join("a", None, timeout_s=2.0)
            until(lambda: heard, "it came")
            assert heard[0] == "Register"
            assert heard.count("Register") == 1
        finally:
            stopping.set()
            thread.join()
            worker.close()
