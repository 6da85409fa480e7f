"""Sixty-four workers start, are called all at once, call each other and end, and leave nothing behind."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from tests.integration.harness import Cluster
from zrpc.errors import LimitError
from zrpc.transport.descriptors import SPARE
from zrpc.transport.local_links import FILES_PER_PEER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORKERS = 64
TIMEOUT_S = 100.0
"""It takes about 10 s on 2 cores: what counts here is that it works."""


@pytest.fixture(params=["file", "broker"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(request.param, tmp_path)
    yield started
    started.close()


def rank_and_pid() -> tuple[int, int]:
    return rpc.get_worker_info().id, os.getpid()


def call_everybody(rank: int) -> list[tuple[int, int]]:
    """Rank 0 calls all 64 at once; each of the others then calls the next one and the one across."""
    reached = range(WORKERS) if rank == 0 else [(rank + 1) % WORKERS, (rank + WORKERS // 2) % WORKERS]
    futures = [rpc.rpc_async(f"worker{other}", rank_and_pid) for other in reached]
    return [future.wait() for future in futures]


@pytest.mark.timeout(120)
def test_sixty_four_workers(cluster: Cluster) -> None:
    results = cluster.run(call_everybody, WORKERS, timeout_s=TIMEOUT_S)
    everybody = dict(results[0])
    assert list(everybody) == list(range(WORKERS))
    assert len(set(everybody.values())) == WORKERS, "each call was served by a process of its own"
    for rank, answers in enumerate(results[1:], start=1):
        called = [(rank + 1) % WORKERS, (rank + WORKERS // 2) % WORKERS]
        assert answers == [(other, everybody[other]) for other in called]


FEW = 8


def reach_some(rank: int) -> tuple[list[int], str]:
    """Worker 1 may open files for two or three peers; whom it reached, and what it was told of the next one."""
    if rank != 1:
        return [], ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + SPARE + 2 * FILES_PER_PEER, hard))
    others = [other for other in range(FEW) if other != rank]
    reached: list[int] = []
    with pytest.raises(LimitError) as told:
        reached.extend(rpc.rpc_sync(f"worker{other}", rank_and_pid)[0] for other in others)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [rpc.rpc_sync(f"worker{other}", rank_and_pid)[0] for other in others] == others, "nothing is stuck"
    return reached, str(told.value)


def test_too_few_open_files_are_said_to_be(tmp_path: Path) -> None:
    cluster = Cluster("file", tmp_path)
    try:
        reached, told = cluster.run(reach_some, FEW)[1]
    finally:
        cluster.close()
    assert 1 <= len(reached) < FEW - 1
    assert "`ulimit -n`" in told


def reach_all(rank: int) -> list[int]:
    """Worker 1 may open as few files more; whom it reached."""
    if rank != 1:
        return []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 25, hard))
    reached = [rpc.rpc_sync(f"worker{other}", rank_and_pid)[0] for other in range(FEW)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return reached


def test_with_a_broker_few_open_files_are_enough(tmp_path: Path) -> None:
    """All go over the connection to the broker, as the error of a worker without one says."""
    cluster = Cluster("broker", tmp_path)
    try:
        assert cluster.run(reach_all, FEW)[1] == list(range(FEW))
    finally:
        cluster.close()
