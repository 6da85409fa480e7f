"""Workers through a real broker process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.integration.broker_harness import TIMEOUT_S, Broker, Worker, WorkerProcess, running_broker, workers
from tests.integration.harness import free_port
from zrpc.errors import AgentClosedError, ConfigError, LimitError, PeerLostError, RefusedError, RendezvousError
from zrpc.wire.envelope import decode
from zrpc.wire.messages import Heartbeat, Leave

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zrpc.transport.brokered import BrokeredEndpoint
    from zrpc.wire.envelope import Buffer
    from zrpc.wire.messages import Message


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running_broker() as started:
        yield started


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_frames_small_and_large_arrive_as_they_were_sent(broker: Broker) -> None:
    large = os.urandom(50 << 20)
    with workers(broker.address, "a", "b") as (a, b):
        a.endpoint.send(b.incarnation, [b"small"])
        a.endpoint.send(b.incarnation, [b"header", large, b"", memoryview(large)[: 1 << 20]])
        b.seen.wait(lambda: len(b.seen.frames) == 2)
        (source, small), (_, frames) = b.seen.frames
        assert source == a.incarnation
        assert small == [b"small"]
        assert frames == [b"header", large, b"", large[: 1 << 20]]
        assert isinstance(frames[1], memoryview)
        assert not frames[1].readonly


def test_messages_keep_their_order_beyond_every_high_water_mark(broker: Broker) -> None:
    count = 40_000
    with workers(broker.address, "a", "b") as (a, b):
        b.hold.clear()
        for number in range(count):
            a.endpoint.send(b.incarnation, [number.to_bytes(4, "big")])
        b.hold.set()
        b.seen.wait(lambda: len(b.seen.frames) == count)
        assert [int.from_bytes(frames[0], "big") for _, frames in b.seen.frames] == list(range(count))


def test_a_worker_reaches_itself(broker: Broker) -> None:
    with workers(broker.address, "a") as (a,):
        a.endpoint.send(a.incarnation, [b"me"])
        a.seen.wait(lambda: a.seen.frames == [(a.incarnation, [b"me"])])


def test_what_comes_before_start_is_kept(broker: Broker) -> None:
    with workers(broker.address, "a", world_size=None) as (a,):
        late = Worker(broker.address)
        late.join("late", None)
        a.seen.wait(lambda: len(a.seen.joined) == 1)
        a.endpoint.send(late.incarnation, [b"early"])
        a.group.refresh()  # the broker has relayed it once this returns
        late.group.refresh()  # and it has been read
        late.start()
        late.seen.wait(lambda: late.seen.frames == [(a.incarnation, [b"early"])])
        late.close()


def test_sending_to_a_stranger_or_after_close_says_so(broker: Broker) -> None:
    with workers(broker.address, "a") as (a,), pytest.raises(PeerLostError, match="not connected"):
        a.endpoint.send(b"somebody", [b"x"])
    with pytest.raises(AgentClosedError):
        a.endpoint.send(a.incarnation, [b"x"])


# ---- membership -----------------------------------------------------------------------------------------------------


def test_a_duplicate_name_is_refused_and_the_others_go_on(broker: Broker) -> None:
    with workers(broker.address, "a", world_size=None) as (a,):
        other = Worker(broker.address)
        with pytest.raises(RefusedError, match="name a is not unique"):
            other.join("a", None)
        other.close()
        a.endpoint.send(a.incarnation, [b"still here"])
        a.seen.wait(lambda: len(a.seen.frames) == 1)


def test_different_world_sizes_are_refused(broker: Broker) -> None:
    with workers(broker.address, "a", world_size=None):
        other = Worker(broker.address)
        with pytest.raises(RefusedError, match="came with world_size=2"):
            other.join("b", 2)
        other.close()


def test_one_broker_serves_run_after_run(broker: Broker) -> None:
    for _ in range(3):
        with workers(broker.address, "a", "b") as (a, b):
            assert sorted(member.info.name for member in a.members) == ["a", "b"]
            assert sorted(member.info.id for member in b.members) == [0, 1]
            assert {member.info.name: member.card for member in b.members} == {"a": {"of": "a"}, "b": {"of": "b"}}


def test_a_goodbye_is_no_loss(broker: Broker) -> None:
    with workers(broker.address, "a", "b") as (a, b):
        b.close()
        a.seen.wait(lambda: a.seen.left == [(b.incarnation, False, "it left the group")])
        with pytest.raises(PeerLostError, match="it left the group"):
            a.endpoint.send(b.incarnation, [b"x"])
        a.group.refresh()
        assert a.seen.lost == []


def test_newcomers_are_known_after_a_refresh(broker: Broker) -> None:
    with workers(broker.address, "a", world_size=None) as (a,), workers(broker.address, "b", world_size=None) as (b,):
        a.group.refresh()
        assert [(member.info.name, member.info.id) for member in a.seen.joined] == [("b", 1)]
        a.endpoint.send(b.incarnation, [b"hello"])
        b.seen.wait(lambda: b.seen.frames == [(a.incarnation, [b"hello"])])


def test_a_group_that_stays_incomplete_says_who_is_there(broker: Broker) -> None:
    alone = Worker(broker.address)
    with pytest.raises(RendezvousError, match=r"1 of 2 workers came to group 'default' .* \(alone\)"):
        alone.join("alone", 2, timeout_s=0.3)
    alone.close()
    with workers(broker.address, "alone", "other"):
        pass  # the one who gave up is out of the way


def test_groups_of_one_broker_are_kept_apart(broker: Broker) -> None:
    one, two = (Worker(broker.address, name, local=False) for name in ("one", "two"))
    for worker in (one, two):
        worker.join("same-name", 1)
        worker.start()
    one.endpoint.add_peer(two.incarnation)  # what only a guess could tell it
    one.endpoint.send(two.incarnation, [b"x"])
    one.seen.wait(lambda: one.seen.lost == [(two.incarnation, "it is not in this group, or no longer")])
    two.group.refresh()
    assert two.seen.frames == []
    one.close()
    two.close()


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_lost_within_seconds(broker: Broker) -> None:
    process = WorkerProcess(broker.address, "victim", 2)
    try:
        with workers(broker.address, "a", world_size=2) as (a,):
            process.wait_joined()
            (victim,) = [member.incarnation for member in a.members if member.info.name == "victim"]
            a.endpoint.send(victim, [b"echo"])
            a.seen.wait(lambda: len(a.seen.frames) == 1)
            process.process.kill()
            a.seen.wait(lambda: a.seen.lost == [(victim, "its connection to the broker is gone")], timeout_s=5.0)
            with pytest.raises(PeerLostError):
                a.endpoint.send(victim, [b"x"])
    finally:
        process.close()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a way to make a process hang")
def test_a_hanging_worker_is_lost_after_its_missed_heartbeats() -> None:
    with running_broker("--heartbeat-interval", "0.1", "--missed", "5") as broker:
        process = WorkerProcess(broker.address, "victim", 2)
        try:
            with workers(broker.address, "a", world_size=2) as (a,):
                process.wait_joined()
                process.process.send_signal(signal.SIGSTOP)
                a.seen.wait(lambda: len(a.seen.lost) == 1, timeout_s=5.0)
                assert "said nothing for too long" in a.seen.lost[0][1]
        finally:
            process.close()


def test_a_broker_that_died_and_does_not_come_back_loses_everybody(broker: Broker) -> None:
    with workers(broker.address, "a", "b", grace_s=0.5) as (a, b):
        broker.kill()
        a.seen.wait(lambda: b.incarnation in {peer for peer, _ in a.seen.lost}, timeout_s=5.0)
        with pytest.raises(PeerLostError, match="connection to the broker"):
            a.endpoint.send(b.incarnation, [b"x"])
        began = time.monotonic()
    assert time.monotonic() - began < 2.0, "leaving does not wait for a dead broker"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a way to make a process hang")
def test_a_hanging_broker_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    with (
        running_broker("--heartbeat-interval", "0.05") as broker,
        workers(broker.address, "a", "b", grace_s=0.5) as (a, b),
    ):
        broker.process.send_signal(signal.SIGSTOP)
        a.seen.wait(lambda: b.incarnation in {peer for peer, _ in a.seen.lost}, timeout_s=5.0)
        b.seen.wait(lambda: a.incarnation in {peer for peer, _ in b.seen.lost}, timeout_s=5.0)
        assert "the connection to the broker broke" in a.seen.lost[0][1]
    assert re.search(r"nothing came .*; here (a reader|no thread) reads, the readers are \w+, \w+", caplog.text)


def test_an_unreachable_broker_is_said_within_the_timeout() -> None:
    worker = Worker(f"broker://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(RendezvousError, match=r"no broker could be reached at broker://127.0.0.1:\d+ within 0.5 s"):
        worker.join("a", 2, timeout_s=0.5)
    worker.close()
    assert time.monotonic() - began < 1.4, "closing does not wait for what nobody takes"


def test_a_port_where_something_else_listens_is_no_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        worker = Worker(f"broker://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(RendezvousError, match="no broker could be reached"):
            worker.join("a", 2, timeout_s=0.5)
        worker.close()


@pytest.mark.parametrize(
    "address", ["broker://nowhere", "broker://127.0.0.1:99999", "broker://no.such.host.invalid:5555"]
)
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError):
        Worker(address)


def test_a_broker_that_comes_late_is_waited_for() -> None:
    port = free_port()
    command = [sys.executable, "-m", "zrpc_broker", "--bind", f"tcp://127.0.0.1:{port}"]
    worker = Worker(f"broker://127.0.0.1:{port}")
    worker.endpoint.open()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert worker.join("a", 1).info.name == "a"
    worker.close()
    process.kill()
    process.wait()


# ---- the process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(broker: Broker, number: signal.Signals) -> None:
    with workers(broker.address, "a"):
        broker.process.send_signal(number)
        assert broker.process.wait(TIMEOUT_S) == 0
    assert broker.close() == ""


def test_the_command_zrpc_broker_is_the_same() -> None:
    code = "from zrpc.cli import main; main()"
    command = [sys.executable, "-c", code, "broker", "--bind", "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with workers(process.stdout.readline().split()[-1], "a", "b"):
            pass
        process.terminate()
        assert process.wait(TIMEOUT_S) == 0


def test_it_is_small(broker: Broker) -> None:
    assert psutil.Process(broker.process.pid).memory_info().rss < 60e6


def test_it_does_not_import_torch() -> None:
    code = (
        "import sys, zrpc_broker.__main__; print([name for name in ('torch', 'numpy', 'typer') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_broker_without_authentication_says_so() -> None:
    command = [sys.executable, "-m", "zrpc_broker", "--bind", "tcp://127.0.0.1:0", "--insecure"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert "without authentication (insecure): whoever reaches this port can run code" in errors


@pytest.mark.parametrize(
    "options",
    [
        ["--bind", "tcp://127.0.0.1"],
        ["--bind", "tcp://0.0.0.0:0", "--insecure"],
        ["--missed", "0"],
        ["--heartbeat-interval", "0"],
    ],
)
def test_bad_options_are_said_and_exit_with_2(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zrpc_broker", *options], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 2
    assert done.stderr.startswith("zrpc broker: ")
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said(broker: Broker) -> None:
    command = [sys.executable, "-m", "zrpc_broker", "--bind", broker.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert "cannot listen on" in done.stderr


def test_an_error_while_a_heartbeat_is_due_does_not_end_the_heartbeats(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something unforeseen goes wrong once in the thread of the heartbeats: it is logged, and they go on."""
    with running_broker("--heartbeat-interval", "0.05") as broker, workers(broker.address, "a", "b") as (a, b):
        is_connected = a.endpoint.is_connected
        asked = threading.Semaphore(0)
        faults = [OSError("a fault on purpose")]

        def once_at_fault() -> bool:
            if faults:
                raise faults.pop()
            asked.release()
            return is_connected()

        monkeypatch.setattr(a.endpoint, "is_connected", once_at_fault)
        for _ in range(3):
            assert asked.acquire(timeout=TIMEOUT_S)
        assert not b.seen.lost
    assert "a fault on purpose" in caplog.text
    assert "zrpc-heartbeat goes on" in caplog.text


class HeldHeartbeats:
    """Stands in for `tell_broker` of an endpoint.

    Attributes:
        sent: what was sent, in order.
        is_held: set when a heartbeat is about to be sent.
        go_on: set it to have heartbeats sent.
    """

    def __init__(self, endpoint: BrokeredEndpoint) -> None:
        self._send = endpoint.tell_broker
        self.sent: list[type[Message]] = []
        self.is_held = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, frames: Sequence[Buffer]) -> None:
        message = decode(list(frames)).message
        if isinstance(message, Heartbeat):
            self.is_held.set()
            self.go_on.wait()
        self._send(frames)
        self.sent.append(type(message))


def test_while_a_heartbeat_is_sent_newcomers_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that takes long to be sent does not keep the reading thread from what the broker says."""
    with (
        running_broker("--heartbeat-interval", "0.05") as broker,
        workers(broker.address, "a", world_size=None) as (a,),
    ):
        held = HeldHeartbeats(a.endpoint)
        monkeypatch.setattr(a.endpoint, "tell_broker", held)
        assert held.is_held.wait(TIMEOUT_S)
        try:
            with workers(broker.address, "b", world_size=None):
                a.seen.wait(lambda: len(a.seen.joined) == 1)
        finally:
            held.go_on.set()


def test_no_heartbeat_comes_after_the_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that leaves while a heartbeat of its own is being sent says goodbye after it."""
    with (
        running_broker("--heartbeat-interval", "0.05") as broker,
        workers(broker.address, "a", world_size=None) as (a,),
    ):
        held = HeldHeartbeats(a.endpoint)
        monkeypatch.setattr(a.endpoint, "tell_broker", held)
        assert held.is_held.wait(TIMEOUT_S)
        leaves = threading.Thread(target=a.group.leave, args=(TIMEOUT_S,))
        leaves.start()
        assert held.sent == []
        held.go_on.set()
        leaves.join()
        assert held.sent == [Heartbeat, Leave]


def test_a_worker_that_gets_no_thread_for_its_heartbeats_does_not_join(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is missing, the broker is told nothing, and the endpoint closes."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "zrpc-heartbeat":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    refused = Worker(broker.address)
    with pytest.raises(LimitError, match="zrpc-heartbeat cannot be started"):
        refused.join("a", 1)
    refused.close()
    monkeypatch.undo()
    with workers(broker.address, "a") as (again,):
        assert again.members[0].info.name == "a"
