"""Who is too slow bounds those who call it: their memory, and the broker's."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

import zrpc as rpc
from tests.integration.harness import Cluster
from tests.waiting import until
from zrpc import errors
from zrpc.agent.current import current_agent
from zrpc.transport.brokered import CREDIT_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

MB = 1_000_000
WAIT_S = 100.0
SLACK = 60 * MB
"""What allocators, thread stacks and ZeroMQ may take besides."""


def rss(pid: int | None = None) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def fresh(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8)


def size_of(tensor: torch.Tensor, seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return tensor.numel()


_gate = threading.Event()
_triggered = threading.Event()


def stand_still(_: object = None) -> int:
    assert _gate.wait(WAIT_S)
    return 0


def open_gate() -> None:
    _gate.set()


def shut_gate() -> None:
    _gate.clear()


# ---- a slow callee -----------------------------------------------------------------------------------------------


def size_once(tensor: torch.Tensor, is_there: str) -> int:
    until(Path(is_there).exists, "all calls are made", within_s=WAIT_S)
    return tensor.numel()


def flood(rank: int, calls: int, all_made: str | None = None) -> int:
    """How much more memory the caller had at most, while its calls take the callee long, or until all are made."""
    if rank != 0:
        return 0
    rpc.rpc_sync("worker1", size_of, args=(fresh(MB),))
    before = most = rss()
    futures = []
    for _ in range(calls):
        if all_made is None:
            futures.append(rpc.rpc_async("worker1", size_of, args=(fresh(MB), 0.005)))
        else:
            futures.append(rpc.rpc_async("worker1", size_once, args=(fresh(MB), all_made), timeout=WAIT_S))
        most = max(most, rss())
    if all_made is not None:
        Path(all_made).touch()
    assert [future.wait() for future in futures] == [MB] * calls
    return most - before


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_slow_callee_bounds_the_memory_of_its_caller(cluster: Cluster, shared_memory: bool) -> None:
    window = 32 * MB
    options = {"shared_memory": shared_memory, "num_worker_threads": 1}
    more, _ = cluster.run(flood, args=(400,), max_in_flight_nbytes=window, **options)
    assert more < window + SLACK
    assert window + SLACK < 400 * MB / 2, "the bound must say something"


def test_without_a_window_a_slow_callee_does_not(cluster: Cluster, tmp_path: Path) -> None:
    """What the test above measures is the window's doing. The callee ends no call before all of them are made."""
    all_made = os.fspath(tmp_path / "all_made")
    more, _ = cluster.run(flood, args=(300, all_made), max_in_flight_nbytes=0, num_worker_threads=1)
    assert more > 32 * MB + SLACK


# ---- waiting for room ----------------------------------------------------------------------------------------------


def no_room(rank: int) -> None:
    if rank != 0:
        return
    first = rpc.rpc_async("worker1", stand_still, args=(fresh(MB),))
    text = r"worker1.* was not sent: .*max_in_flight_nbytes"
    with pytest.raises(errors.OverloadedError, match=text):
        rpc.rpc_sync("worker1", size_of, args=(fresh(MB),), timeout=0.2)
    with pytest.raises(errors.OverloadedError, match=text):
        rpc.rpc_async("worker1", size_of, args=(fresh(MB),), timeout=0.2).wait()
    made = rpc.remote("worker1", size_of, args=(fresh(MB),), timeout=0.2)
    with pytest.raises(errors.RRefError, match="was not sent"):
        made.to_here()
    assert rpc.rpc_sync("worker1", size_of, args=(fresh(10),)) == 10, "small calls need no room"
    rpc.rpc_sync("worker1", open_gate)
    assert first.wait() == 0
    assert rpc.rpc_sync("worker1", size_of, args=(fresh(3 * MB),)) == 3 * MB, "a large one goes alone"


def test_who_finds_no_room_in_time_is_told(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(no_room, max_in_flight_nbytes=3 * MB // 2)


def timed_out(rank: int) -> None:
    if rank != 0:
        return
    with pytest.raises(errors.RpcTimeoutError):
        rpc.rpc_sync("worker1", stand_still, args=(fresh(MB),), timeout=0.2)
    with pytest.raises(errors.OverloadedError):  # the bytes of the first still lie at the callee
        rpc.rpc_sync("worker1", size_of, args=(fresh(MB),), timeout=0.2)
    rpc.rpc_sync("worker1", open_gate)
    assert rpc.rpc_sync("worker1", size_of, args=(fresh(MB),)) == MB, "its late answer made room"


def test_what_timed_out_counts_until_it_is_answered(cluster: Cluster) -> None:
    cluster.run(timed_out, max_in_flight_nbytes=3 * MB // 2)


def number_in_flight(rank: int) -> int:
    if rank != 0:
        return 0
    threads = [threading.Thread(target=rpc.rpc_sync, args=("worker1", stand_still)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until_refused()
    opened = rpc.rpc_async("worker2", reopen)
    for thread in threads:
        thread.join(WAIT_S)
    assert opened.wait() is None
    return rpc.rpc_sync("worker1", size_of, args=(fresh(10),))


def until_refused() -> None:
    """Until three other calls are on their way to worker1."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            rpc.rpc_sync("worker1", size_of, args=(fresh(10),), timeout=0.1)
        except errors.OverloadedError as refusal:
            if "max_in_flight_calls" not in str(refusal):
                raise
            return
    raise AssertionError("no call is refused")


def reopen() -> None:
    rpc.rpc_sync("worker1", open_gate)


def test_the_number_of_calls_is_bounded_too(cluster: Cluster) -> None:
    assert cluster.run(number_in_flight, 3, max_in_flight_calls=3)[0] == 10


def await_trigger() -> None:
    assert _triggered.wait(WAIT_S)


def end_trigger() -> None:
    _triggered.set()


def in_callbacks(rank: int) -> int:
    """A callback that waited for room would keep the completer thread from completing other futures."""
    if rank != 0:
        return 0
    held = rpc.rpc_async("worker1", stand_still, args=(fresh(MB),))
    trigger = rpc.rpc_async("worker1", await_trigger)
    nested = trigger.then(lambda _: rpc.rpc_async("worker1", size_of, args=(fresh(MB),)))
    rpc.rpc_sync("worker1", end_trigger)  # not before: else the callback runs here, and this thread may wait
    answered = nested.wait().wait()
    rpc.rpc_sync("worker1", open_gate)
    return int(answered) + held.wait()


def test_callbacks_do_not_wait(cluster: Cluster) -> None:
    assert cluster.run(in_callbacks, max_in_flight_nbytes=3 * MB // 2, rpc_timeout=10)[0] == MB


def bounce(tensor: torch.Tensor, depth: int) -> int:
    if not depth:
        return 1
    here = rpc.get_worker_info().id
    return 1 + rpc.rpc_sync(1 - here, bounce, args=(tensor, depth - 1))


def nested(rank: int) -> list[int]:
    futures = [rpc.rpc_async(1 - rank, bounce, args=(fresh(100_000), 5)) for _ in range(20)]
    return [future.wait() for future in futures]


def test_nested_calls_that_wait_for_room_on_both_sides_come_to_an_end(cluster: Cluster) -> None:
    """A handler thread that waits for room lets others work, and answers need no room."""
    answers = cluster.run(nested, max_in_flight_nbytes=250_000, num_worker_threads=2, rpc_timeout=0)
    assert answers == [[6] * 20] * 2


def wait_for_a_dead_one(rank: int, folder: Path) -> None:
    if rank == 1:
        signal.pause()
    assert not rpc.rpc_async("worker1", stand_still, args=(fresh(MB),)).done()
    (folder / "waits").touch()
    with pytest.raises(errors.PeerLostError, match="worker1"):
        rpc.rpc_sync("worker1", size_of, args=(fresh(MB),), timeout=0)
    with pytest.raises(errors.PeerLostError):
        rpc.shutdown()


def join_and_wait(rank: int, method: str, folder: Path) -> None:
    options = rpc.RpcBackendOptions(init_method=method, max_in_flight_nbytes=3 * MB // 2)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    wait_for_a_dead_one(rank, folder)


def test_a_lost_callee_ends_the_wait(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    cluster = cluster_in_each_mode
    running = cluster.start(join_and_wait, args=(cluster.new_init_method(), tmp_path), init=False)
    until_there(tmp_path / "waits")
    running.kill(1)
    assert running.wait(WAIT_S)[0].error is None


def until_there(path: Path) -> None:
    """Until a worker process has made that file, which sends no event."""
    until(path.exists, f"{path.name} is made", within_s=WAIT_S)


# ---- a worker that does not read -----------------------------------------------------------------------------------

CALLS, NBYTES = 400, MB
BROKER_CREDIT = CREDIT_NBYTES


def produce(nbytes: int) -> torch.Tensor:
    return fresh(nbytes)


def send_to_a_stopped_one(rank: int, folder: Path) -> int:
    """Two workers send to a third, which stands still, and go on calling each other."""
    if rank == 2:
        until_there(folder / "over")
        return 0
    assert rpc.rpc_sync("worker2", size_of, args=(fresh(MB),)) == MB
    (folder / f"ready{rank}").touch()
    until_there(folder / "stopped")
    futures = [rpc.rpc_async("worker2", size_of, args=(fresh(NBYTES),)) for _ in range(CALLS)]
    assert rpc.rpc_sync(1 - rank, size_of, args=(fresh(MB),)) == MB, "the others are served"
    (folder / f"sent{rank}").touch()
    got = sum(future.wait() for future in futures)
    if rank == 0:
        assert rpc.rpc_sync("worker1", until_there, args=(folder / "sent1",)) is None
        (folder / "over").touch()
    return int(got)


@pytest.fixture
def brokered(tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster("broker", tmp_path)
    yield started
    started.close()


@pytest.mark.timeout(300)
def test_a_worker_that_does_not_read_does_not_fill_the_broker(brokered: Cluster, tmp_path: Path) -> None:
    """Nor does it lose anything, if it goes on soon enough."""
    running = brokered.start(send_to_a_stopped_one, 3, args=(tmp_path,), shared_memory=False)
    for rank in (0, 1):
        until_there(tmp_path / f"ready{rank}")
    broker, stopped = brokered.broker_pid(), running.processes[2].pid
    before = rss(broker)
    os.kill(stopped, signal.SIGSTOP)
    try:
        (tmp_path / "stopped").touch()
        for rank in (0, 1):
            until_there(tmp_path / f"sent{rank}")
        at_rest = settled(broker)
    finally:
        os.kill(stopped, signal.SIGCONT)
    outcomes = running.wait(WAIT_S)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert [outcome.result for outcome in outcomes] == [CALLS * NBYTES] * 2 + [0]
    assert at_rest - before < 2 * BROKER_CREDIT + SLACK
    assert 2 * BROKER_CREDIT + SLACK < CALLS * NBYTES / 2, "the bound must say something"


def settled(pid: int) -> int:
    """The memory of a process once it does not grow any more."""
    last, now = 0, rss(pid)
    while now > last:
        time.sleep(0.2)
        last, now = now, rss(pid)
    return max(last, now)


def ask_and_stand_still(rank: int, folder: Path, calls: int, nbytes: int) -> int:
    """worker1 asks for more than it reads, because it is stopped; how many answers were dropped."""
    if rank == 0:
        until(lambda: num_serving() == calls, "all calls have come", num_serving, WAIT_S)
        (folder / "ready").touch()
        until_there(folder / "over")
        return 0
    assert rpc.rpc_sync("worker0", produce, args=(MB,)).numel() == MB
    stopped = str(folder / "stopped")
    futures = [rpc.rpc_async("worker0", produce_when, args=(nbytes, calls, stopped)) for _ in range(calls)]
    dropped = 0
    for future in futures:
        try:
            assert future.wait().numel() == nbytes
        except errors.OverloadedError as refusal:
            if "the answer was dropped" not in str(refusal):
                raise
            dropped += 1
    (folder / "over").touch()
    return dropped


_lock = threading.Lock()
_answered = 0
_same: dict[int, torch.Tensor] = {}


def produce_when(nbytes: int, calls: int, stopped: str) -> torch.Tensor:
    """A fresh tensor, or the same very large one, once the caller stands still."""
    global _answered
    until_there(Path(stopped))
    with _lock:
        _answered += 1
        if _answered == calls:
            Path(stopped).with_name("answered").touch()
        return fresh(nbytes) if nbytes <= MB else _same.setdefault(nbytes, fresh(nbytes))


def num_serving() -> int:
    return current_agent().counts()["server_active_calls"]


@dataclass
class Stopped:
    """What came of it: growth in bytes while worker1 was stopped, and how many answers were dropped."""

    broker: int
    answerer: int
    dropped: int


def stop_a_caller(cluster: Cluster, folder: Path, calls: int, nbytes: int, limit: int) -> Stopped:
    options = {"shared_memory": False, "max_in_flight_nbytes": limit}
    running = cluster.start(ask_and_stand_still, 2, args=(folder, calls, nbytes), **options)
    until_there(folder / "ready")
    watched = [running.processes[0].pid, *([cluster.broker_pid()] if cluster.mode == "broker" else [])]
    before = [rss(pid) for pid in watched]
    os.kill(running.processes[1].pid, signal.SIGSTOP)
    try:
        (folder / "stopped").touch()
        until_there(folder / "answered")
        grown = [settled(pid) - old for pid, old in zip(watched, before, strict=True)]
    finally:
        os.kill(running.processes[1].pid, signal.SIGCONT)
    outcomes = running.wait(WAIT_S)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    return Stopped(grown[-1], grown[0], outcomes[1].result)


def test_answers_for_a_worker_that_does_not_read_wait_where_they_were_made(brokered: Cluster, tmp_path: Path) -> None:
    seen = stop_a_caller(brokered, tmp_path, CALLS, NBYTES, limit=0)
    assert seen.dropped == 0
    assert seen.broker < BROKER_CREDIT + SLACK


def test_beyond_a_window_answers_are_dropped_with_a_word(brokered: Cluster, tmp_path: Path) -> None:
    seen = stop_a_caller(brokered, tmp_path, CALLS, NBYTES, limit=100 * MB)
    assert CALLS / 2 < seen.dropped < CALLS
    assert seen.broker < BROKER_CREDIT + SLACK
    assert seen.answerer < CALLS * NBYTES * 3 / 4


def test_so_they_are_without_a_broker(cluster: Cluster, tmp_path: Path) -> None:
    assert 0 < stop_a_caller(cluster, tmp_path, 120, 8 * MB, limit=100 * MB).dropped < 120
