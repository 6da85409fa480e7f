"""ZeroMQ's I/O threads: real contexts, and the policies that the kernel tells of."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.waiting import until
from zrpc.transport import io_threads, sockets
from zrpc.transport.io_threads import COUNT, INBOUND, OUTBOUND, IoThreads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.transport.sockets import Context

PLAIN = "ZMQbg/IO/"
"""What I/O threads are called in a context that gives them no prefix."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="policies are Linux's")


@pytest.fixture
def begun() -> Iterator[tuple[Context, IoThreads]]:
    context, threads = io_threads.make_context()
    sock = sockets.make_socket(context, zmq.DEALER, io_thread=OUTBOUND)
    wait_named(threads)
    yield context, threads
    sock.close()
    context.term()


def wait_named(threads: IoThreads) -> None:
    """Until they run: they name themselves then."""
    until(lambda: len(policies().get(threads.prefix, ())) == COUNT, "the I/O threads run", policies)


def policies() -> dict[str, list[int]]:
    """The policies of the I/O threads of all contexts of this process, by what their names begin with."""
    found: dict[str, list[int]] = {}
    for entry in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{entry}/comm") as comm:
            prefix, name, _ = comm.read().partition("ZMQbg/IO/")
        if name:
            found.setdefault(prefix + name, []).append(os.sched_getscheduler(int(entry)))
    return found


def test_polite_threads_are_batch_threads_until_they_are_not(begun: tuple[Context, IoThreads]) -> None:
    _, threads = begun
    before = policies()
    assert before[threads.prefix] == [os.SCHED_OTHER] * COUNT
    threads.be_polite(True)
    assert policies() == {**before, threads.prefix: [os.SCHED_BATCH] * COUNT}
    threads.be_polite(False)
    assert policies() == before


def test_those_of_other_contexts_stay_as_they_are(begun: tuple[Context, IoThreads]) -> None:
    _, threads = begun
    num_plain = len(policies().get(PLAIN, ()))
    other, others = io_threads.make_context()
    users: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socks = [other.socket(zmq.DEALER), users.socket(zmq.DEALER)]
    wait_named(others)
    until(lambda: len(policies().get(PLAIN, ())) > num_plain, "a user's I/O thread runs", policies)
    before = policies()
    assert {threads.prefix, others.prefix, "ZMQbg/IO/"} <= before.keys()
    others.be_polite(True)
    threads.be_polite(True)
    threads.be_polite(False)
    after = policies()
    for sock in socks:
        sock.close()
    other.term()
    users.term()
    assert after == {**before, others.prefix: [os.SCHED_BATCH] * COUNT}


def test_a_policy_that_somebody_wanted_stays(begun: tuple[Context, IoThreads]) -> None:
    _, threads = begun
    for entry in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{entry}/comm") as comm:
            if comm.read().startswith(threads.prefix):
                os.sched_setscheduler(int(entry), os.SCHED_IDLE, os.sched_param(0))
    threads.be_polite(True)
    assert policies()[threads.prefix] == [os.SCHED_IDLE] * COUNT


def test_where_it_is_forbidden_all_goes_on(begun: tuple[Context, IoThreads], monkeypatch: pytest.MonkeyPatch) -> None:
    _, threads = begun
    asked = []

    def forbid(*args: object) -> None:
        asked.append(args)
        raise PermissionError("no")

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    threads.be_polite(True)
    threads.be_polite(False)
    threads.be_polite(True)
    assert len(asked) == 1


def test_what_they_run_is_counted(begun: tuple[Context, IoThreads]) -> None:
    context, threads = begun
    before = threads.cpu_s()
    assert before > 0
    there, here = (sockets.make_socket(context, kind, io_thread=OUTBOUND) for kind in (zmq.ROUTER, zmq.DEALER))
    here.connect(f"tcp://127.0.0.1:{there.bind_to_random_port('tcp://127.0.0.1')}")
    here.send(bytes(64 << 20))
    there.recv_multipart()
    carried = threads.cpu_s()
    assert carried - before > 0.001  # a copy into the kernel, and one out of it
    for sock in (there, here):
        sock.close()
    assert IoThreads("nobody").cpu_s() == 0.0


def test_each_direction_has_a_thread_of_its_own(begun: tuple[Context, IoThreads]) -> None:
    context, _ = begun
    sock = sockets.make_socket(context, zmq.ROUTER, io_thread=INBOUND)
    assert sock.getsockopt(zmq.AFFINITY) == INBOUND
    assert context.get(zmq.IO_THREADS) == COUNT
    sock.close()
