"""A worker that may open no more files: what comes in shared memory cannot be received, and it says so.

Each slab that is new to its receiver comes as a file, for which the receiver needs a free descriptor for a moment.
"""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc.errors import LimitError
from zrpc.gather import all_gather
from zrpc.transport.copying import SPLIT_MIN_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.harness import Cluster

LARGE = 1_000_000
WAIT_S = 60.0
WORDS = r"a large buffer could not be received, as process {pid} may open no more files \(\d+ of at most \d+ are open\)"
ADVICE = "raise its limit with `ulimit -n`"


_taken: list[int] = []
_limits: list[tuple[int, int]] = []


def take_all_files(spare: int = 0) -> int:
    """Let this process open only `spare` more files; its id."""
    _limits.append(resource.getrlimit(resource.RLIMIT_NOFILE))
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, _limits[0][1]))
    with suppress(OSError):
        while True:
            _taken.append(os.dup(0))
    for _ in range(spare):
        os.close(_taken.pop())
    return os.getpid()


def give_files_back() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _limits.pop())
    while _taken:
        os.close(_taken.pop())


@contextmanager
def no_files_at(worker: str, spare: int = 0) -> Iterator[str]:
    """That worker may open only `spare` more; what an error of it says."""
    rpc.rpc_sync(worker, num_slabs)  # they are connected, both ways
    pid = rpc.rpc_sync(worker, take_all_files, args=(spare,))
    try:
        yield WORDS.format(pid=pid) + ".*" + ADVICE
    finally:
        rpc.rpc_sync(worker, give_files_back)


def num_slabs() -> int:
    """How many slabs this worker has to send in."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the folder itself
            count += os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:zrpc-slab")
    return count


def total(*tensors: torch.Tensor) -> float:
    return float(sum(tensor.sum() for tensor in tensors))


def make(count: int = 1) -> list[torch.Tensor]:
    return [torch.ones(LARGE // 4 * (number + 1)) for number in range(count)]


def make_whole() -> torch.Tensor:
    """A tensor that is in its slab before its message leaves; else the next call may find the slab being filled."""
    return torch.ones(SPLIT_MIN_NBYTES // 4)


def run_on_first(cluster: Cluster, function: Callable[[], None]) -> None:
    cluster.run(run_if_first, args=(function,), timeout_s=WAIT_S)


def run_if_first(rank: int, function: Callable[[], None]) -> None:
    if rank == 0:
        function()
    all_gather(None)


# ---- requests --------------------------------------------------------------------------------------------------------


def send_what_cannot_be_received() -> None:
    (tensor,) = make()
    with no_files_at("worker1") as said:
        for _ in range(5):
            with pytest.raises(LimitError, match=said):
                rpc.rpc_sync("worker1", total, args=(tensor,), timeout=WAIT_S)
        with pytest.raises(LimitError, match=said):
            rpc.rpc_async("worker1", total, args=(tensor,), timeout=WAIT_S).wait()
        with pytest.raises(LimitError, match=said):
            rpc.remote("worker1", total, args=(tensor,), timeout=WAIT_S).to_here()
        with pytest.raises(LimitError, match=said):
            rpc.rpc_sync("worker1", torch.add, args=(tensor, 1), timeout=WAIT_S)
        assert rpc.rpc_sync("worker1", total, args=(torch.ones(3),)) == 3, "what is small is served as before"
        assert num_slabs() <= 1, "each call used the slab that the one before could not hand over"
    assert rpc.rpc_sync("worker1", total, args=(tensor,)) == LARGE / 4
    assert num_slabs() <= 1


def test_a_request_that_cannot_be_received_fails_with_what_to_do_and_frees_its_slab(
    cluster_in_each_mode: Cluster,
) -> None:
    """The callee does not run it; once it may open files again, the same slab serves."""
    run_on_first(cluster_in_each_mode, send_what_cannot_be_received)


def send_some_that_cannot_be_received() -> None:
    tensors = make(5)
    with no_files_at("worker1", spare=2) as said:
        with pytest.raises(LimitError, match=said):
            rpc.rpc_sync("worker1", total, args=tuple(tensors), timeout=WAIT_S)
        until(partial(is_received, tensors), "each time some more of the slabs are known there", within_s=WAIT_S)
    until(lambda: not num_slabs(), "all slabs are free, and let go of", num_slabs, WAIT_S)


def is_received(tensors: list[torch.Tensor]) -> bool:
    try:
        assert rpc.rpc_sync("worker1", total, args=tuple(tensors), timeout=WAIT_S) == 15 * LARGE / 4
    except LimitError:
        return False
    return True


def test_of_a_request_that_is_received_in_part_all_slabs_are_freed(cluster: Cluster) -> None:
    """Those that came, and those that did not. At last all are known there, and it is received."""
    run_on_first(cluster, send_some_that_cannot_be_received)


def send_many_at_once() -> None:
    tensors = make(5)
    with no_files_at("worker1") as said:
        futures = [rpc.rpc_async("worker1", total, args=tuple(tensors), timeout=WAIT_S) for _ in range(40)]
        for future in futures:
            with pytest.raises(LimitError, match=said):
                future.wait()
        before = num_slabs()
        for _ in range(20):
            with pytest.raises(LimitError, match=said):
                rpc.rpc_sync("worker1", total, args=tuple(tensors), timeout=WAIT_S)
        assert num_slabs() <= before
    futures = [rpc.rpc_async("worker1", total, args=tuple(tensors)) for _ in range(40)]
    assert [future.wait() for future in futures] == [15 * LARGE / 4] * 40


def test_many_requests_at_once_that_cannot_be_received_all_fail(cluster: Cluster) -> None:
    """And none of them keeps a slab."""
    run_on_first(cluster, send_many_at_once)


# ---- answers ---------------------------------------------------------------------------------------------------------


def ask_for_what_cannot_be_received() -> None:
    rpc.rpc_sync("worker1", num_slabs)  # they are connected, both ways
    said = WORDS.format(pid=take_all_files()) + ".*" + ADVICE
    for _ in range(5):
        with pytest.raises(LimitError, match=said):
            rpc.rpc_sync("worker1", make_whole, timeout=WAIT_S)
    with pytest.raises(LimitError, match=said):
        rpc.rpc_async("worker1", make_whole, timeout=WAIT_S).wait()
    rref = rpc.remote("worker1", make_whole)
    with pytest.raises(LimitError, match=said):
        rref.to_here(timeout=WAIT_S)
    assert rpc.rpc_sync("worker1", num_slabs) <= 1
    give_files_back()
    assert total(rref.to_here()) == SPLIT_MIN_NBYTES / 4
    assert rpc.rpc_sync("worker1", num_slabs) <= 1


def test_an_answer_that_cannot_be_received_fails_with_what_to_do_and_frees_its_slab(
    cluster_in_each_mode: Cluster,
) -> None:
    """At the caller, whose own limit it is; what it asked for can be asked for again."""
    run_on_first(cluster_in_each_mode, ask_for_what_cannot_be_received)


# ---- one for many ----------------------------------------------------------------------------------------------------


def broadcast_what_one_cannot_receive() -> None:
    (tensor,) = make()
    with no_files_at("worker1") as said:
        for _ in range(3):
            refused, received = rpc.broadcast(["worker1", "worker2"], total, args=(tensor,), timeout=WAIT_S)
            assert received.wait() == LARGE / 4
            with pytest.raises(LimitError, match=said):
                refused.wait()
        assert num_slabs() <= 1
    for future in rpc.broadcast(["worker1", "worker2"], total, args=(tensor,)):
        assert future.wait() == LARGE / 4
    assert num_slabs() <= 1


def test_a_broadcast_that_one_worker_cannot_receive_reaches_the_others(cluster: Cluster) -> None:
    """Its future alone fails, and the slab that all share is freed."""
    cluster.run(run_if_first, 3, args=(broadcast_what_one_cannot_receive,), timeout_s=WAIT_S)
