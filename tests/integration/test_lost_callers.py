"""The end of a worker calls off what it had asked of others, in each way to meet."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zrpc as rpc
from tests.integration.harness import MODES
from tests.waiting import until
from zrpc import errors
from zrpc.agent.current import current_agent

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

THREADS = 2
QUEUED = 20
_seen: list[Any] = []


def see(mark: Any) -> None:
    _seen.append(mark)


def seen() -> list[Any]:
    return list(_seen)


def run_until_cancelled(mark: str) -> None:
    see(f"{mark} began")
    until(rpc.is_cancelled, "this call is cancelled", within_s=60)
    see(f"{mark} was cancelled")


def run_there(to: str, mark: str) -> None:
    rpc.rpc_sync(to, run_until_cancelled, args=(mark,))


async def sleep(mark: str) -> None:
    see(f"{mark} began")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        see(f"{mark} was cancelled")
        raise


def make(path: str) -> str:
    see("creation began")
    until(Path(path).exists, "the creation may end", within_s=60)
    see(f"creation ended, cancelled: {rpc.is_cancelled()}")
    return "made"


def counts() -> dict[str, int]:
    return current_agent().counts()


def ask_and_die(folder: str) -> None:
    """Ask worker0 for all kinds of things, and die when it says that they have come."""
    calls = [
        rpc.rpc_async("worker0", run_there, args=("worker2", "nested")),
        rpc.rpc_async("worker0", sleep, args=("coroutine",)),
        rpc.rpc_async("worker0", run_until_cancelled, args=("function",)),
    ]
    creation = rpc.remote("worker0", make, args=(f"{folder}/made",))
    until(Path(folder, "busy").exists, "all threads are at work", within_s=60)
    calls += [rpc.rpc_async("worker0", see, args=("queued ran",)) for _ in range(QUEUED)]
    queued = rpc.remote("worker0", see, args=("queued creation ran",))
    fetch = creation.to_here_async()
    until(Path(folder, "queued").exists, "all have come", within_s=60)
    del queued, fetch
    os.kill(os.getpid(), signal.SIGKILL)


def survive(rank: int, folder: str) -> list[Any]:
    if rank == 1:
        ask_and_die(folder)
    began = {"coroutine began", "function began", "creation began"}
    if rank == 2:
        until(lambda: "nested was cancelled" in seen(), "the nested call is cancelled", seen, within_s=60)
    else:
        until(lambda: began <= set(seen()), "what can run does", seen, within_s=60)
        Path(folder, "busy").touch()
        until(lambda: counts()["server_queued_calls"] > QUEUED, "the others wait", counts, within_s=60)
        Path(folder, "queued").touch()
        until(lambda: "function was cancelled" in seen(), "the function is cancelled", seen, within_s=60)
        until(lambda: "coroutine was cancelled" in seen(), "the coroutine is cancelled", seen)
        until(lambda: counts()["server_active_calls"] == 1, "the creation alone goes on", counts)
        assert counts()["server_queued_calls"] == 0
        assert counts()["server_cancelled_calls"] == 3 + QUEUED + 1 + 1
        Path(folder, "made").touch()
        until(lambda: counts()["server_active_calls"] == 0, "the creation is over", counts)
    with pytest.raises(errors.PeerLostError, match="worker1 is lost"):
        rpc.shutdown()
    return seen()


def start(rank: int, method: str, folder: str, options: dict[str, Any]) -> list[Any]:
    made = rpc.RpcBackendOptions(init_method=method, num_worker_threads=THREADS, **options)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=made)
    return survive(rank, folder)


WAYS = [*((mode, {}) for mode in MODES), ("tcp", {"shared_memory": False}), ("broker", {"shared_memory": False})]


@pytest.mark.parametrize(("cluster_in_each_mode", "options"), WAYS, indirect=["cluster_in_each_mode"])
def test_a_worker_that_dies_calls_off_what_it_had_asked_for(
    cluster_in_each_mode: Cluster, options: dict[str, Any], tmp_path: Path
) -> None:
    """Queued calls and creations never run; functions and coroutines are cancelled, with what they led to elsewhere.

    A creation that runs is not: others may hold its RRef.
    """
    cluster = cluster_in_each_mode
    args = (cluster.new_init_method(), str(tmp_path), options)
    callee, _, nested = cluster.start(start, 3, args=args, init=False).wait(150)
    assert callee.error is None, callee.error
    assert nested.error is None, nested.error
    assert "queued ran" not in callee.result
    assert "queued creation ran" not in callee.result
    assert "creation ended, cancelled: False" in callee.result


def ask_once_and_die(rank: int, method: str, ran: str, options: dict[str, Any]) -> None:
    made = rpc.RpcBackendOptions(init_method=method, num_worker_threads=THREADS, **options)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=made)
    if rank == 0:
        until(lambda: "only was cancelled" in seen(), "the function is cancelled", seen)
        Path(ran).touch()
        rpc.shutdown(graceful=False)
        return
    call = rpc.rpc_async("worker0", run_and_tell, args=(ran,))
    until(Path(ran + "-began").exists, "it runs")
    del call
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_tell(ran: str) -> None:
    Path(ran + "-began").touch()
    run_until_cancelled("only")


@pytest.mark.parametrize(("cluster_in_each_mode", "options"), WAYS, indirect=["cluster_in_each_mode"])
def test_the_end_of_a_caller_to_which_nothing_was_ever_sent_is_noticed(
    cluster_in_each_mode: Cluster, options: dict[str, Any], tmp_path: Path
) -> None:
    """A worker that serves a call for some time has an eye on its caller, whatever connects them."""
    cluster, ran = cluster_in_each_mode, str(tmp_path / "ran")
    args = (cluster.new_init_method(), ran, options)
    callee, _ = cluster.start(ask_once_and_die, 2, args=args, init=False).wait(100)
    assert callee.error is None, callee.error
