"""A worker that dies hangs nobody."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from zrpc import errors

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

PATIENCE_S = 30.0
"""Far below the 60 s after which a call would time out on its own: whoever notices the loss does so before this."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_called = threading.Event()


def double(n: int) -> int:
    _called.set()
    return 2 * n


def outlive(rank: int) -> str:
    if rank == 1:
        signal.pause()
    started = time.monotonic()
    with pytest.raises(errors.PeerLostError, match="worker1"):
        rpc.rpc_sync("worker1", die)
    with pytest.raises(errors.PeerLostError, match="worker1"):
        rpc.rpc_async("worker1", double, args=(1,)).wait()
    if rank == 0:
        assert rpc.rpc_sync("worker2", double, args=(4,)) == 8
    else:
        assert _called.wait(PATIENCE_S), "worker0 does not call"
    assert time.monotonic() - started < PATIENCE_S, "it was the time limit that ended the call"
    with pytest.raises(errors.PeerLostError, match="worker1"):
        rpc.shutdown()
    with pytest.raises(errors.NotInitializedError):
        rpc.get_worker_info()
    return "outlived"


def test_a_dead_peer_hangs_nobody(cluster_in_each_mode: Cluster) -> None:
    cluster = cluster_in_each_mode
    outcomes = cluster.start(started_and_outlive, 3, args=(cluster.new_init_method(),), init=False).wait(150)
    assert [outcome.error for outcome in outcomes if outcome.rank != 1] == [None, None]
    assert [outcome.result for outcome in outcomes] == ["outlived", None, "outlived"]


def started_and_outlive(rank: int, init_method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
    return outlive(rank)


def test_a_peer_that_dies_before_shutdown(cluster_in_each_mode: Cluster) -> None:
    """Nobody has called anybody: the loss is noticed all the same, by those who wait for the dead at shutdown."""
    cluster = cluster_in_each_mode
    outcomes = cluster.start(shut_down_without, 4, args=(cluster.new_init_method(),), init=False).wait(150)
    assert [outcome.error for outcome in outcomes if outcome.rank != 2] == [None, None, None]
    assert [outcome.result for outcome in outcomes] == ["told", "told", None, "told"]


def shut_down_without(rank: int, init_method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=4, rpc_backend_options=options)
    if rank == 2:
        die()
    started = time.monotonic()
    with pytest.raises(errors.PeerLostError, match="worker2"):
        rpc.shutdown()
    assert time.monotonic() - started < PATIENCE_S
    return "told"
