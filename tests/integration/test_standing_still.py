"""A worker stands still for longer than its peers' connections to it last, and goes on: it is called again."""

from __future__ import annotations

import os
import signal
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


def echo(x: torch.Tensor) -> torch.Tensor:
    return x


def answers(name: str) -> bool:
    x = torch.ones(5_000)  # too large for a shortcut
    try:
        return torch.equal(rpc.rpc_sync(name, echo, args=(x,), timeout=2), x)
    except RpcTimeoutError:
        return False


def program(rank: int, method: str, shared_memory: bool) -> None:
    sockets.HEARTBEAT_INTERVAL_MS, sockets.HEARTBEAT_TIMEOUT_MS = 100, 500
    options = rpc.RpcBackendOptions(init_method=method, shared_memory=shared_memory)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        assert answers("worker1")
        stopped = rpc.rpc_sync("worker1", os.getpid)
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert not answers("worker1")
        finally:
            os.kill(stopped, signal.SIGCONT)
        until(lambda: answers("worker1"), "it answers")
        assert rpc.rpc_sync("worker1", answers, args=("worker0",))
    rpc.shutdown()


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_worker_that_stood_still_is_called_again(cluster: Cluster, shared_memory: bool) -> None:
    cluster.run(program, 2, args=(cluster.new_init_method(), shared_memory), init=False)
