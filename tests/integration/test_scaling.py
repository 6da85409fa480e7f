"""Sixty-four workers start, are called all at once, call each other and end, and leave nothing behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from tests.integration.harness import Cluster

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
