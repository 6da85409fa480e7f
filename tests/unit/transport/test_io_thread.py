"""ZeroMQ's I/O thread: real contexts, and the policies that the kernel tells of."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.waiting import until
from zrpc.transport import io_thread, sockets
from zrpc.transport.io_thread import IoThread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.transport.sockets import Context

PLAIN = "ZMQbg/IO/"
"""What I/O threads are called in a context that gives them no prefix."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="policies are Linux's")


@pytest.fixture
def begun() -> Iterator[tuple[Context, IoThread]]:
    context, thread = io_thread.make_context()
    sock = sockets.make_socket(context, zmq.DEALER)
    wait_named(thread)
    yield context, thread
    sock.close()
    context.term()


def wait_named(thread: IoThread) -> None:
    """Until it runs: it names itself then."""
    until(lambda: len(policies().get(thread.prefix, ())) == 1, "the I/O thread runs", policies)


def policies() -> dict[str, list[int]]:
    """The policies of the I/O threads of all contexts of this process, by what their names begin with."""
    found: dict[str, list[int]] = {}
    for entry in os.listdir("/proc/self/task"):
        with suppress(OSError):  # some have just ended
            with open(f"/proc/self/task/{entry}/comm") as comm:
                prefix, name, _ = comm.read().partition(PLAIN)
            if name:
                found.setdefault(prefix + name, []).append(os.sched_getscheduler(int(entry)))
    return found


def test_a_polite_thread_is_a_batch_thread_until_it_is_not(begun: tuple[Context, IoThread]) -> None:
    _, thread = begun
    before = policies()
    assert before[thread.prefix] == [os.SCHED_OTHER]
    thread.be_polite(True)
    assert policies() == {**before, thread.prefix: [os.SCHED_BATCH]}
    thread.be_polite(False)
    assert policies() == before


def test_those_of_other_contexts_stay_as_they_are(begun: tuple[Context, IoThread]) -> None:
    _, thread = begun
    num_plain = len(policies().get(PLAIN, ()))
    other, others = io_thread.make_context()
    users: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socks = [other.socket(zmq.DEALER), users.socket(zmq.DEALER)]
    wait_named(others)
    until(lambda: len(policies().get(PLAIN, ())) > num_plain, "a user's I/O thread runs", policies)
    before = policies()
    assert {thread.prefix, others.prefix, PLAIN} <= before.keys()
    others.be_polite(True)
    thread.be_polite(True)
    thread.be_polite(False)
    after = policies()
    for sock in socks:
        sock.close()
    other.term()
    users.term()
    assert after == {**before, others.prefix: [os.SCHED_BATCH]}


def test_a_policy_that_somebody_wanted_stays(begun: tuple[Context, IoThread]) -> None:
    _, thread = begun
    for entry in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{entry}/comm") as comm:
            if comm.read().startswith(thread.prefix):
                os.sched_setscheduler(int(entry), os.SCHED_IDLE, os.sched_param(0))
    thread.be_polite(True)
    assert policies()[thread.prefix] == [os.SCHED_IDLE]


def test_where_it_is_forbidden_all_goes_on(begun: tuple[Context, IoThread], monkeypatch: pytest.MonkeyPatch) -> None:
    _, thread = begun
    asked = []

    def forbid(*args: object) -> None:
        asked.append(args)
        raise PermissionError("no")

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    thread.be_polite(True)
    thread.be_polite(False)
    thread.be_polite(True)
    assert len(asked) == 1


def test_what_they_run_is_counted(begun: tuple[Context, IoThread]) -> None:
    context, thread = begun
    before = thread.cpu_s()
    assert before > 0
    there, here = (sockets.make_socket(context, kind) for kind in (zmq.ROUTER, zmq.DEALER))
    here.connect(f"tcp://127.0.0.1:{there.bind_to_random_port('tcp://127.0.0.1')}")
    here.send(bytes(64 << 20))
    there.recv_multipart()
    carried = thread.cpu_s()
    assert carried > before
    for sock in (there, here):
        sock.close()
    assert IoThread("nobody").cpu_s() is None
