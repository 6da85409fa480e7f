"""A worker without a broker stands still for a while, and goes on: nothing is lost, or at least it is called again."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc.errors import RpcTimeoutError
from zrpc.transport import sockets

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a way to make a process stand still")

STILL_S = 1.2 * sockets.HEARTBEAT_TIMEOUT_MS / 1000
LARGE = 64 << 20
"""More than the kernel holds for one who does not read."""


def echo(x: torch.Tensor) -> torch.Tensor:
    return x


def call(name: str, nbytes: int, timeout_s: float) -> bool:
    x = torch.ones(nbytes, dtype=torch.uint8)
    try:
        return torch.equal(rpc.rpc_sync(name, echo, args=(x,), timeout=timeout_s), x)
    except RpcTimeoutError:
        return False


def go_on(stopped: int, after_s: float) -> threading.Timer:
    timer = threading.Timer(after_s, os.kill, (stopped, signal.SIGCONT))
    timer.start()
    return timer


def stand_still(rank: int) -> None:
    if rank == 0:
        assert call("worker1", 20_000, 30)  # several packets
        stopped = rpc.rpc_sync("worker1", os.getpid)
        timer = go_on(stopped, STILL_S)
        os.kill(stopped, signal.SIGSTOP)
        assert call("worker1", 20_000, 60), "the call that found it so is answered"
        timer.join()
        assert rpc.rpc_sync("worker1", call, args=("worker0", 20_000, 30))


@pytest.mark.parametrize("shared_memory", [False, True])
def test_what_is_sent_to_a_worker_that_stands_still_waits_for_it(cluster: Cluster, shared_memory: bool) -> None:
    cluster.run(stand_still, 2, shared_memory=shared_memory)


def stand_still_for_too_long(rank: int, method: str) -> None:
    sockets.UNACKNOWLEDGED_MAX_MS = 1_000
    options = rpc.RpcBackendOptions(init_method=method, shared_memory=False)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        stopped = rpc.rpc_sync("worker1", os.getpid)
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert not call("worker1", LARGE, 5)
        finally:
            os.kill(stopped, signal.SIGCONT)
        until(lambda: call("worker1", 20_000, 2), "it answers")
        assert rpc.rpc_sync("worker1", call, args=("worker0", 20_000, 30))
    rpc.shutdown()


def test_a_worker_that_stood_still_for_too_long_is_called_again(cluster: Cluster) -> None:
    cluster.run(stand_still_for_too_long, 2, args=(cluster.new_init_method(),), init=False)
