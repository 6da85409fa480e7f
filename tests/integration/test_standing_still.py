"""A worker without a broker stands still for a while, and goes on: nothing is lost, or at least it is called again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc.errors import PeerLostError, RpcTimeoutError
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


def stand_still_with_full_buffers(rank: int) -> None:
    if rank == 0:
        stopped = rpc.rpc_sync("worker1", os.getpid)
        timer = go_on(stopped, STILL_S)
        os.kill(stopped, signal.SIGSTOP)
        x = torch.ones(LARGE, dtype=torch.uint8)
        futures = [rpc.rpc_async("worker1", echo, args=(x,), timeout=60) for _ in range(3)]
        for future in futures:
            assert torch.equal(future.wait(), x)
        timer.join()
        assert rpc.rpc_sync("worker1", call, args=("worker0", 20_000, 30))


def test_more_than_the_kernel_holds_waits_for_a_worker_that_stands_still(cluster: Cluster) -> None:
    """Its kernel acknowledges all the while, so that it is not lost, and no call is, for whatever time."""
    cluster.run(stand_still_with_full_buffers, 2, shared_memory=False)


class Lines(logging.Handler):
    """What the log said."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def matching(self, part: str) -> list[str]:
        return [line for line in self.lines if part in line]


def suspect(rank: int, dies: bool) -> None:
    if rank != 0:
        threading.Event().wait(60) if dies else None
        return
    told = Lines()
    logging.getLogger("zrpc").addHandler(told)
    logging.getLogger("zrpc").setLevel(logging.INFO)
    stopped = rpc.rpc_sync("worker1", os.getpid)
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: psutil.Process(stopped).status() == psutil.STATUS_STOPPED, "it stands still")
    future = rpc.rpc_async("worker1", abs, args=(-1,), timeout=60)
    until(lambda: told.matching("does not answer"), "it is suspected", within_s=60)
    if dies:
        os.kill(stopped, signal.SIGKILL)
        with pytest.raises(PeerLostError):
            future.wait()
        assert not told.matching("answers again")
    else:
        os.kill(stopped, signal.SIGCONT)
        assert future.wait() == 1
        until(lambda: told.matching("answers again"), "it came back")
        assert not told.matching("is lost")
    assert len(told.matching("does not answer")) == 1
    logging.getLogger("zrpc").removeHandler(told)


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_worker_that_stands_still_is_named_once_and_so_is_its_coming_back(
    cluster_in_each_mode: Cluster, shared_memory: bool
) -> None:
    """A worker to which calls are under way and that does not react is suspected, and not lost."""
    cluster_in_each_mode.run(suspect, 2, args=(False,), shared_memory=shared_memory, liveness_timeout=2)


def test_a_worker_that_stood_still_and_dies_does_not_come_back(cluster: Cluster) -> None:
    """A suspected worker comes back or is lost, and never both."""
    running = cluster.start(suspect, 2, args=(True,), liveness_timeout=2)
    first, _ = running.wait(60.0)
    assert first.error is None or "is lost" in first.error.splitlines()[-1], first.error
