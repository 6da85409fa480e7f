"""The broker dies and is started again, or another one takes its place: its workers come back by themselves."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.integration.broker_harness import GIVEN_UP, TIMEOUT_S, Broker, Worker, WorkerProcess, running_broker, workers
from tests.waiting import until
from zrpc.errors import NotConnectedError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator


def relays(a: Worker, b: Worker, text: bytes) -> None:
    """A message of `a` to `b` arrives through the broker."""
    a.group.refresh()  # it knows of `b` then

    def is_sent() -> bool:
        try:
            a.endpoint.send(b.incarnation, [text])
        except NotConnectedError:
            return False
        return True

    until(is_sent, "it can be sent")
    b.seen.wait(lambda: (a.incarnation, [text]) in b.seen.frames)


def meet(broker: Broker, *at_it: Worker) -> None:
    """All of them are at `broker`, and can be sent to."""
    endpoints = [worker.endpoint for worker in at_it]
    until(lambda: all(one.address == broker.address and one.is_resumed() for one in endpoints), "they are there")


@contextmanager
def again(broker: Broker) -> Iterator[Broker]:
    """A broker in the place of one that is killed."""
    broker.kill()
    with running_broker(bind=broker.address) as second:
        yield second


@pytest.mark.parametrize("world_size", [0, None], ids=["static", "dynamic"])
def test_workers_come_back_to_a_broker_that_was_started_again(world_size: int | None) -> None:
    """They know each other as before, nobody is lost, and messages are relayed in both directions."""
    with (
        running_broker() as broker,
        workers(broker.address, "a", "b", "c", world_size=world_size, local=False) as (a, b, c),
    ):
        relays(a, b, b"before")
        with again(broker):
            for number, (one, other) in enumerate([(a, b), (b, a), (c, a), (a, c)]):
                relays(one, other, b"after %d" % number)
            assert not any(worker.seen.lost or worker.seen.left for worker in (a, b, c))


def test_workers_of_one_host_reach_each_other_while_there_is_no_broker() -> None:
    """Their links do not pass through it."""
    with running_broker() as broker, workers(broker.address, "a", "b") as (a, b):
        a.endpoint.send(b.incarnation, [b"before"])
        broker.kill()
        until(lambda: not a.endpoint.is_resumed(), "the loss of the broker is noticed")
        for number in range(100):
            a.endpoint.send(b.incarnation, [b"%d" % number])
        b.seen.wait(lambda: len(b.seen.frames) == 101)
        assert not a.seen.lost


def test_what_cannot_be_sent_while_there_is_no_broker_says_so() -> None:
    """Nothing of it is sent later."""
    with running_broker() as broker, workers(broker.address, "a", "b", local=False) as (a, b):
        broker.kill()
        until(lambda: not a.endpoint.is_resumed(), "the loss of the broker is noticed")
        with pytest.raises(NotConnectedError, match="Nothing was sent"):
            a.endpoint.send(b.incarnation, [b"lost"])
        with running_broker(bind=broker.address):
            relays(a, b, b"after")
            assert [frames for _, frames in b.seen.frames] == [[b"after"]]


def test_a_worker_that_died_with_the_broker_is_lost_once() -> None:
    """The others wait for it, for as long as the broker does, and go on without it."""
    with running_broker() as broker:
        process = WorkerProcess(broker.address, "victim", 3)
        try:
            with workers(broker.address, "a", "b", world_size=3, local=False) as (a, b):
                process.wait_joined()
                (victim,) = [member.incarnation for member in a.members if member.info.name == "victim"]
                broker.process.send_signal(signal.SIGSTOP)
                process.close()
                with again(broker):
                    relays(a, b, b"after")
                    for worker in (a, b):
                        worker.seen.wait(lambda worker=worker: len(worker.seen.lost) == 1)  # type: ignore[misc]
                        assert [peer for peer, _ in worker.seen.lost] == [victim]
                        worker.group.refresh()
                        assert len(worker.seen.lost) == 1
        finally:
            process.close()


def test_workers_come_and_members_go_on_while_one_that_died_is_waited_for() -> None:
    """A newcomer, and a new life of the one that died: nobody waits for as long as the broker does for the old one."""
    with running_broker() as broker:
        process = WorkerProcess(broker.address, "victim", 0)
        try:
            process.wait_joined()
            with workers(broker.address, "a", "b", world_size=None, local=False) as (a, b):
                (victim,) = [member.incarnation for member in a.members if member.info.name == "victim"]
                broker.process.send_signal(signal.SIGSTOP)
                process.close()
                with again(broker) as second, workers(second.address, "d", world_size=None, local=False) as (d,):
                    assert {member.info.name for member in d.members} == {"a", "b", "d"}
                    relays(d, a, b"hello")
                    relays(a, b, b"after")
                    assert not a.seen.lost, "the one that died is waited for"
                    with workers(second.address, "victim", world_size=None, local=False) as (new,):
                        assert {member.info.name for member in new.members} == {"a", "b", "d", "victim"}
                        for worker in (a, b):
                            worker.seen.wait(lambda worker=worker: "victim" in names(worker))  # type: ignore[misc]
                            assert [peer for peer, _ in worker.seen.lost] == [victim]
        finally:
            process.close()


@pytest.mark.parametrize("world_size", [0, 3], ids=["dynamic", "static"])
def test_messages_for_a_member_that_is_not_back_arrive_when_it_is(world_size: int) -> None:
    """In the order in which they were sent. The others go on with each other meanwhile."""
    with running_broker() as broker:
        process = WorkerProcess(broker.address, "slow", world_size)
        try:
            with workers(broker.address, "a", "b", world_size=world_size or None, local=False) as (a, b):
                process.wait_joined()
                a.group.refresh()
                (slow,) = [one.incarnation for one in (*a.members, *a.seen.joined) if one.info.name == "slow"]
                process.process.send_signal(signal.SIGSTOP)
                with again(broker):
                    relays(a, b, b"after")
                    for number in range(100):
                        a.endpoint.send(slow, [b"%d" % number])
                    relays(b, a, b"after")
                    process.process.send_signal(signal.SIGCONT)
                    a.seen.wait(lambda: len(a.seen.frames) == 101)
                    echoes = [frames for source, frames in a.seen.frames if source == slow]
                    assert echoes == [[b"%d" % number] for number in range(100)]
                    assert not a.seen.lost
        finally:
            process.close()


def test_newcomers_get_names_and_ranks_that_are_free() -> None:
    """One comes to the broker before the members of the group are back."""
    with (
        running_broker() as broker,
        workers(broker.address, "a", "b", world_size=None, local=False) as (a, b),
        again(broker) as second,
        workers(second.address, "c", world_size=None, local=False) as (c,),
    ):
        assert {member.info.name for member in c.members} == {"a", "b", "c"}
        assert {member.info.id for member in c.members} == {0, 1, 2}
        for worker in (a, b):
            worker.seen.wait(lambda worker=worker: "c" in names(worker))  # type: ignore[misc]
        relays(c, b, b"hello")
        same = Worker(second.address)
        with pytest.raises(RefusedError, match="name a is not unique"):
            same.join("a", None)
        same.close()


def names(worker: Worker) -> set[str]:
    return {member.info.name for member in worker.seen.joined}


def test_a_static_group_that_is_forming_is_formed_by_the_next_broker() -> None:
    """One of two has registered when the broker dies."""
    with running_broker() as broker:
        a, b = Worker(broker.address), Worker(broker.address)
        joining = threading.Thread(target=a.join, args=("a", 2))
        joining.start()
        until(a.endpoint.is_connected, "it is connected")
        with again(broker):
            b.join("b", 2)
            joining.join(TIMEOUT_S)
            assert [member.info.name for member in a.members] == [member.info.name for member in b.members]
        a.close()
        b.close()


def test_another_broker_of_the_list_takes_over_and_the_first_after_it() -> None:
    """Workers start at the first of two; both die, one after the other, and each time all meet at the other one."""
    with running_broker() as first, running_broker() as second:
        listed = [first.address, second.address]
        with workers(listed, "a", "b", world_size=None, local=False) as (a, b):
            assert a.endpoint.address == b.endpoint.address == first.address
            first.kill()
            meet(second, a, b)
            relays(a, b, b"through the second")
            assert a.endpoint.address == b.endpoint.address == second.address
            with running_broker(bind=first.address):
                late = Worker(listed, local=False)
                late.join("late", None)
                late.start()
                assert late.endpoint.address == second.address, "newcomers go where the group is"
                relays(late, a, b"hello")
                second.kill()
                meet(first, a, b, late)
                relays(b, a, b"through the first again")
                assert {worker.endpoint.address for worker in (a, b)} == {first.address}
                relays(late, b, b"all of them")
                assert not a.seen.lost
                late.close()


def test_a_broker_that_stood_still_for_a_while_goes_on() -> None:
    """Nobody is lost, and no connection breaks."""
    with running_broker() as broker, workers(broker.address, "a", "b", local=False) as (a, b):
        broker.process.send_signal(signal.SIGSTOP)
        a.endpoint.send(b.incarnation, [b"meanwhile"])
        assert not b.seen.frames
        broker.process.send_signal(signal.SIGCONT)
        b.seen.wait(lambda: len(b.seen.frames) == 1)
        assert a.endpoint.is_resumed()


def test_a_worker_that_was_given_up_is_told_so_when_it_comes_back() -> None:
    """It stands still for longer than the next broker waits: it and the others are lost for each other."""
    with running_broker() as broker:
        process = WorkerProcess(broker.address, "still", 2, ends_when_alone=True)
        try:
            with workers(broker.address, "a", world_size=2, local=False) as (a,):
                process.wait_joined()
                (still,) = [member.incarnation for member in a.members if member.info.name == "still"]
                process.process.send_signal(signal.SIGSTOP)
                broker.kill()
                with running_broker(bind=broker.address):
                    a.seen.wait(lambda: [peer for peer, _ in a.seen.lost] == [still])
                    process.process.send_signal(signal.SIGCONT)
                    assert process.process.wait(TIMEOUT_S) == GIVEN_UP, "it is told that it is lost"
                    a.group.refresh()
                    assert len(a.seen.lost) == 1
        finally:
            process.close()
