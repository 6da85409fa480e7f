"""What workers take of memory, in real processes: idle, with calls in flight, small and large, and after many RRefs.

`python -m benchmarks.memory` measures the same, in full. Bounds are on what a process has alone and on RSS, as psutil
says.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc.agent import deadlines
from zrpc.agent.current import current_agent
from zrpc.gather import all_gather
from zrpc.rref import context as rref_context
from zrpc.rref.context import RRefContext
from zrpc.rref.table import RRefTable
from zrpc.transport.carrier import TRIM_S

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

MB = 1_000_000
IDLE_MAX = 15 * MB
CALLS = 100_000
IN_FLIGHT_MAX = 400 * MB
RREFS = 10_000
WAIT_S = 60.0

BARE = "import torch; print('ready', flush=True); input()"
IDLE = """
import sys, torch, zrpc as rpc
rank, method = int(sys.argv[1]), sys.argv[2]
options = rpc.RpcBackendOptions(init_method=method)
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
print("ready", flush=True)
input()
rpc.shutdown()
"""


def settled() -> int:
    """This process's RSS, once garbage is gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


# ---- idle ----------------------------------------------------------------------------------------------------------


def run_idle(method: str) -> list[tuple[int, int]]:
    """RSS and memory of its own of a process that only imported torch, and of two idle workers."""
    commands = [["-c", BARE], ["-c", IDLE, "0", method], ["-c", IDLE, "1", method]]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([sys.executable, *command], stdin=pipe, stdout=pipe) for command in commands]
    try:
        found = []
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            memory = psutil.Process(process.pid).memory_full_info()
            found.append((memory.rss, memory.uss))
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
        assert [process.wait(WAIT_S) for process in processes] == [0, 0, 0]
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


def test_an_idle_worker_takes_little_more_than_torch(cluster_in_each_mode: Cluster) -> None:
    (bare_rss, bare_own), *workers = run_idle(cluster_in_each_mode.new_init_method())
    for rss, own in workers:
        assert rss - bare_rss < IDLE_MAX
        assert own - bare_own < IDLE_MAX


UNUSED = ("encodings.idna", "stringprep", "zmq.asyncio")
ALONE = f"""
import sys, torch, zrpc as rpc
options = rpc.RpcBackendOptions(init_method=sys.argv[1])
rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=options)
rpc.shutdown()
print([name for name in {UNUSED} if name in sys.modules])
"""


def test_an_idle_worker_has_loaded_no_tables_of_names_and_no_sockets_for_asyncio(cluster_in_each_mode: Cluster) -> None:
    """Python's tables of international names and ZeroMQ's asyncio sockets take 0.4 MB, and a worker uses neither."""
    command = [sys.executable, "-c", ALONE, cluster_in_each_mode.new_init_method()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- calls in flight -----------------------------------------------------------------------------------------------

_gate = threading.Event()
_launched = threading.Event()


def noop() -> None:
    return None


def stand_still() -> None:
    assert _gate.wait(WAIT_S)


def wait_for_launch() -> None:
    assert _launched.wait(WAIT_S)


def fly(rank: int) -> int:
    """So much does the caller take for calls that are all unanswered; they are all answered in the end."""
    if rank == 1:
        rpc.rpc_sync("worker0", wait_for_launch, timeout=WAIT_S)
        _gate.set()
        return 0
    for future in [rpc.rpc_async("worker1", noop) for _ in range(1000)]:
        future.wait()
    before = settled()
    futures = [rpc.rpc_async("worker1", stand_still, timeout=0) for _ in range(CALLS)]
    assert not any(future.done() for future in futures)
    took = int(psutil.Process().memory_info().rss) - before
    _launched.set()
    assert all(future.wait() is None for future in futures)
    return took


def test_calls_in_flight_take_little(cluster: Cluster) -> None:
    assert cluster.run(fly, timeout_s=WAIT_S, num_worker_threads=4)[0] < IN_FLIGHT_MAX


# ---- large calls in flight ----------------------------------------------------------------------------------------

LARGE = 10 * MB
WINDOW = 105 * MB
HELD = WINDOW // LARGE
CALLS_MADE = 6 * HELD
SLACK = 80 * MB
"""What allocators and stacks may take besides: glibc keeps up to 64 MiB of free memory at the top of a thread's arena,
also after `malloc_trim`, and ZeroMQ's threads receive into theirs."""

GIVEN_BACK_S = 3 * TRIM_S + WAIT_S / 4
"""Slabs are let go of after two looks, and unmapped by who received them with the next one."""

_arrived = threading.Semaphore(0)


def sleep_on(tensor: torch.Tensor) -> int:
    """Keep the tensor until the main thread of this worker has seen a whole window of such calls."""
    _arrived.release()
    assert _gate.wait(WAIT_S)
    return tensor.numel()


def wake_up_late() -> bool:
    """Serve as many calls as the window lets go at once; then whether another one came, which it must not have."""
    for _ in range(HELD):
        assert _arrived.acquire(timeout=WAIT_S)
    is_one_more = _arrived.acquire(blocking=False)
    _gate.set()
    return is_one_more


def peak() -> int:
    """The most that lay in memory of this process since `settled_anew`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def settled_anew() -> int:
    before = settled()
    Path("/proc/self/clear_refs").write_text("5")
    return before


def call_a_sleeper(rank: int, gives_back: bool) -> int:
    """By how much this worker grew at most; it is soon back where it was, if it is to be."""
    if rank == 0:
        rpc.rpc_sync("worker1", torch.Tensor.numel, args=(torch.ones(LARGE, dtype=torch.uint8),))
    all_gather(None)
    before = settled_anew()
    all_gather(None)
    if rank == 0:
        futures = [
            rpc.rpc_async("worker1", sleep_on, args=(torch.ones(LARGE, dtype=torch.uint8),), timeout=0)
            for _ in range(CALLS_MADE)
        ]
        assert [future.wait() for future in futures] == [LARGE] * CALLS_MADE
        futures.clear()
    else:
        assert not wake_up_late()
    all_gather(None)
    most = peak() - before
    if gives_back:
        until(lambda: settled() < before + SLACK, "the memory is given back", lambda: settled() - before, GIVEN_BACK_S)
    return most


def run_a_sleeper(cluster: Cluster, shared_memory: bool, gives_back: bool) -> list[int]:
    options = {"shared_memory": shared_memory, "num_worker_threads": HELD + 2, "max_in_flight_nbytes": WINDOW}
    return cluster.run(call_a_sleeper, args=(gives_back,), timeout_s=WAIT_S, **options)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_calls_to_a_callee_that_sleeps_take_what_the_window_allows(cluster: Cluster, shared_memory: bool) -> None:
    """At either end: a window while it sleeps, and a part of another while that one is let go of.

    ZeroMQ encrypts copies, which are another window without shared memory.
    """
    bound = (2 if shared_memory else 3) * WINDOW + SLACK
    assert bound < 0.7 * CALLS_MADE * LARGE, "the bound must say something"
    assert max(run_a_sleeper(cluster, shared_memory, gives_back=False)) < bound


@pytest.mark.parametrize("shared_memory", [True, False])
def test_calls_to_a_callee_that_sleeps_leave_nothing(cluster: Cluster, shared_memory: bool) -> None:
    """Once all are answered and their tensors are gone, both workers are soon where they were."""
    run_a_sleeper(cluster, shared_memory, gives_back=True)


# ---- RRefs ---------------------------------------------------------------------------------------------------------


def use(_: object) -> None:
    return None


def own_and_lend() -> rpc.RRef[int]:
    return rpc.RRef(1)


def num_kept() -> int:
    info = current_agent().extensions[RRefContext].debug_info()
    return int(info["num_owner_rrefs"]) + int(info["num_pending_users"])


def make_and_drop(count: int) -> None:
    """RRefs of every kind: made by remote, fetched, passed back to their owner, and got in an answer."""
    for _ in range(count // 100):
        rrefs = [rpc.remote("worker1", noop) for _ in range(50)]
        calls = [rpc.rpc_async("worker1", use, args=(rref,)) for rref in rrefs]
        lent = [rpc.rpc_async("worker1", own_and_lend) for _ in range(25)]
        mine = [rpc.rpc_async("worker1", use, args=(rpc.RRef(2),)) for _ in range(25)]
        assert [rref.to_here() for rref in rrefs] == [None] * 50
        assert [future.wait().to_here() for future in lent] == [1] * 25
        for call in calls + mine:
            call.wait()


def num_blocks() -> int:
    """How many blocks of memory Python has in use, once garbage is gone."""
    gc.collect()
    return sys.getallocatedblocks()


def drop_many(rank: int) -> None:
    rref_context.RRefTable = partial(RRefTable, remembered_max=1000)  # type: ignore[misc]  # filled soon, and bounded
    deadlines.SWEEP_MIN_COUNT = 64  # the same
    all_gather(rank)  # the other one's first call would otherwise make a table here that remembers 16 times as many

    def make_and_drop_until_owners_know(count: int) -> None:
        if rank == 0:
            make_and_drop(count)
        all_gather(count)
        until(lambda: not num_kept(), "no RRef is kept", num_kept)
        all_gather(count)  # nor by the other one, which has been told of all that was dropped here

    make_and_drop_until_owners_know(RREFS)
    before = num_blocks()
    make_and_drop_until_owners_know(2 * RREFS)
    until(lambda: num_blocks() < before + RREFS // 2, "as much is in use as before", lambda: num_blocks() - before)


def test_rrefs_that_were_dropped_leave_nothing_behind(cluster: Cluster) -> None:
    """What one leaves, many would add up to. Blocks are counted: the resident set varies by more than that."""
    cluster.run(drop_many, timeout_s=2 * WAIT_S)
