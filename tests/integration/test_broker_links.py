"""Workers of one host that pass their broker by: messages keep their order, and the broker has its say."""

from __future__ import annotations

import random
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.integration.broker_harness import TIMEOUT_S, Broker, Worker, running_broker, workers
from tests.unit.transport.endpoints import check_order, mixed_message
from tests.waiting import until
from zrpc.errors import PeerLostError
from zrpc.transport import descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.ids import Incarnation
    from zrpc.transport.inbox import Work
    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there are local links on Linux only")


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running_broker() as started:
        yield started


def test_messages_keep_their_order_past_the_broker(broker: Broker) -> None:
    """Of one packet and of several, some hundreds without a pause; several threads send."""
    num_threads, num_rounds, each = 3, 10, 150
    with workers(broker.address, "a", "b") as (a, b):
        assert a.endpoint.takes_files(b.incarnation)
        together = threading.Barrier(num_threads + 1)

        def send(thread: int) -> None:
            chance = random.Random(thread)
            for turn in range(num_rounds):
                together.wait(TIMEOUT_S)
                for number in range(turn * each, (turn + 1) * each):
                    a.endpoint.send(b.incarnation, mixed_message(thread, number, chance))

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(num_threads)]
        for one in threads:
            one.start()
        for turn in range(num_rounds):
            together.wait(TIMEOUT_S)
            b.seen.wait(lambda turn=turn: len(b.seen.frames) == (turn + 1) * num_threads * each)  # type: ignore[misc]
        for one in threads:
            one.join()
        names = [bytes(frames[0]) for _, frames in b.seen.frames]
        check_order(names, num_threads, num_rounds * each)


def test_what_somebody_sent_before_it_left_comes_before_its_goodbye(broker: Broker) -> None:
    count = 200
    with workers(broker.address, "a", "b") as (a, b):
        assert a.endpoint.takes_files(b.incarnation)
        came_before: list[int] = []
        may_work: list[bool] = []
        deliver = b.endpoint._on_frames

        def on_frames(source: Incarnation, frames: list[Buffer]) -> Work | None:
            may_work.append(b.endpoint.inbox.can_work)
            return deliver(source, frames)

        b.endpoint._on_frames = on_frames
        b.group._on_left = lambda *_: came_before.append(len(b.seen.frames))  # type: ignore[assignment]
        b.hold.clear()
        for number in range(count):
            a.endpoint.send(b.incarnation, [number.to_bytes(4, "little")])
        a.close()
        b.hold.set()
        until(lambda: came_before, "the goodbye has come")
        assert came_before == [count]
        assert [int.from_bytes(frames[0], "little") for _, frames in b.seen.frames] == list(range(count))
        assert not any(may_work[-count // 2 :]), "one that waits for another of them would keep that from being served"
        until(lambda: b.endpoint.inbox.can_work, "readers are given work again")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a way to make a process hang")
def test_a_hanging_broker_is_noticed_by_workers_that_pass_it_by() -> None:
    with (
        running_broker("--heartbeat-interval", "0.05") as broker,
        workers(broker.address, "a", "b", grace_s=0.5) as (a, b),
    ):
        assert a.endpoint.takes_files(b.incarnation)
        assert b.endpoint.takes_files(a.incarnation)
        broker.process.send_signal(signal.SIGSTOP)

        def lost() -> bool:
            try:
                a.endpoint.send(b.incarnation, [b"small"])
                b.endpoint.send(a.incarnation, [b"small"])
            except PeerLostError:
                return True
            return False

        until(lost, "the broker is taken for dead")
        for one, other in ((a, b), (b, a)):
            one.seen.wait(lambda one=one, other=other: other.incarnation in dict(one.seen.lost))  # type: ignore[misc]
            assert "the connection to the broker broke" in one.seen.lost[0][1]


def test_a_worker_that_shares_no_memory_is_reached_through_the_broker(broker: Broker) -> None:
    a, b = Worker(broker.address), Worker(broker.address, local=False)
    try:
        for worker, name in ((a, "a"), (b, "b")):
            worker.join(name, None)
            worker.start()
        a.group.refresh()
        for _ in range(3):
            a.endpoint.send(b.incarnation, [b"there"])
            b.endpoint.send(a.incarnation, [b"back"])
        a.seen.wait(lambda: a.seen.frames == [(b.incarnation, [b"back"])] * 3)
        b.seen.wait(lambda: b.seen.frames == [(a.incarnation, [b"there"])] * 3)
        assert not a.endpoint.takes_files(b.incarnation)
        assert not b.endpoint.takes_files(a.incarnation)
    finally:
        a.close()
        b.close()


def test_where_files_are_not_plenty_the_broker_is_the_way(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "are_plenty", lambda: False)
    with workers(broker.address, "a", "b") as (a, b):
        for number in range(20):
            a.endpoint.send(b.incarnation, [b"%d" % number])
        b.seen.wait(lambda: len(b.seen.frames) == 20)
        assert not a.endpoint.takes_files(b.incarnation)
