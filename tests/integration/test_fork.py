"""Workers that fork: a child is no worker, and does not keep its parent alive for others."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from zrpc.errors import NotInitializedError, PeerLostError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LIMIT_S = 60.0
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

_children: list[int] = []


def fork_child() -> int:
    """Fork a child that lives until it is killed."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    return child


def hang() -> None:
    threading.Event().wait(LIMIT_S)


def echo(x: torch.Tensor) -> torch.Tensor:
    return x


def a_parent_dies(rank: int) -> str:
    if rank == 1:
        hang()
    assert torch.equal(rpc.rpc_sync("worker1", echo, args=(torch.ones(100_000),)), torch.ones(100_000))
    for _ in range(50):  # on a connection of small messages too
        rpc.rpc_sync("worker1", os.getpid)
    pid = rpc.rpc_sync("worker1", os.getpid)
    child = rpc.rpc_sync("worker1", fork_child)
    try:
        under_way = rpc.rpc_async("worker1", hang, timeout=LIMIT_S)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerLostError):
            under_way.wait()
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
    rpc.shutdown(graceful=False)
    return "noticed"


def test_a_worker_that_dies_is_noticed_while_its_forked_child_lives(cluster_in_each_mode: Cluster) -> None:
    running = cluster_in_each_mode.start(init_and_run, 2, init=False, args=(cluster_in_each_mode.new_init_method(),))
    outcomes = running.wait(40)
    assert outcomes[0].error is None, outcomes[0].error
    assert outcomes[0].result == "noticed"


def init_and_run(rank: int, init_method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    return a_parent_dies(rank)


def child_ends(how: str) -> int:
    """Fork a child that looks at what it may do, and ends; its exit status."""
    received = torch.arange(5.0)
    child = os.fork()
    if child == 0:
        status = 7
        try:
            rpc.rpc_sync("worker0", echo, args=(received,))
        except NotInitializedError:
            status = 0 if float(received.sum()) == 10 else 8
        if how == "exit":
            os._exit(status)
        try:
            raise SystemExit(status)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def children_come_and_go(rank: int) -> int:
    to = f"worker{1 - rank}"
    big = torch.arange(100_000.0)
    for how in ("exit", "raise"):
        assert rpc.rpc_sync(to, child_ends, args=(how,)) == 0
        assert torch.equal(rpc.rpc_sync(to, echo, args=(big,)), big)
        for _ in range(40):
            assert rpc.rpc_sync(to, abs, args=(-1,)) == 1
    return 1


def test_children_that_end_do_their_parent_no_harm(cluster_in_each_mode: Cluster) -> None:
    assert cluster_in_each_mode.run(children_come_and_go, 2) == [1, 1]


def descriptors_of_children(rank: int) -> bool:
    """Whether a child has none of its parent's connections and memory files."""
    to = f"worker{1 - rank}"
    for _ in range(50):
        rpc.rpc_sync(to, abs, args=(-1,))
    rpc.rpc_sync(to, echo, args=(torch.ones(100_000),))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        links = []
        for entry in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{entry}"))
            except OSError:
                continue
        kept = [link for link in links if link.startswith("/memfd:zrpc")]
        os.write(writer, b"none" if not kept else b"some")
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 10)
    os.close(reader)
    os.close(writer)
    return said == b"none"


def test_a_child_has_no_memory_files_of_its_parent(cluster: Cluster) -> None:
    assert cluster.run(descriptors_of_children, 2) == [True, True]
