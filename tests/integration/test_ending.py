"""A shutdown that waits in vain names what it waited for."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from tests.integration.test_shutdown_after_loss import shutdown_of
from tests.waiting import until
from zrpc import autograd, errors
from zrpc.agent.current import current_agent

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LIMIT_S = 0.5


def hold(path: str) -> None:
    until(Path(path).exists, "the function may end", within_s=60)


def serving(count: int) -> bool:
    return current_agent().counts()["server_active_calls"] >= count


def end(rank: int, init_method: str, shutdown: str, over: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 1:
        held = rpc.remote("worker0", str)
        held.to_here()
        running = rpc.rpc_async("worker0", hold, args=(over,))
        until(Path(over).exists, "the other one has shut down", within_s=60)
        with pytest.raises(errors.ZrpcError):
            running.wait()
        rpc.shutdown(graceful=False)
        return ""
    until(lambda: serving(1), "a function runs")
    with autograd.context(), pytest.raises(errors.PeerLostError) as caught:
        shutdown_of(shutdown)(timeout=LIMIT_S)  # type: ignore[call-arg]
    Path(over).touch()
    return str(caught.value)


@pytest.mark.parametrize("shutdown", ["zrpc", "torch"])
def test_a_shutdown_to_which_a_worker_does_not_come_says_what_is_under_way_here_and_there(
    cluster_in_each_mode: Cluster, tmp_path: Path, shutdown: str
) -> None:
    """Functions with their ages and their callers or callees, RRefs with their holders, contexts of autograd."""
    args = (cluster_in_each_mode.new_init_method(), shutdown, str(tmp_path / "over"))
    text = cluster_in_each_mode.run(end, 2, args=args, init=False)[0]
    assert f"worker1 did not come within {LIMIT_S:g} s" in text
    there, here = text.split("At worker1: ")[1].split("Here: ")
    assert "1 calls that others are to answer (PythonCall of hold to worker0, for " in there
    assert "1 calls that run here (PythonCall of hold for worker1, for " in here
    assert "1 RRefs of this worker are held (GloballyUniqueId(" in here
    assert ") by worker1)" in here
    assert "1 autograd contexts (" in here


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logged() -> Lines:
    """What zrpc logs here from now on."""
    kept = Lines()
    logging.getLogger("zrpc").addHandler(kept)
    return kept


_over = threading.Event()


def hold_here() -> None:
    _over.wait(60)


def end_with_calls(rank: int, init_method: str) -> list[str]:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    kept = logged()
    if rank == 1:
        rpc.rpc_async("worker0", hold_here)
    else:
        until(lambda: serving(1), "a function runs")
    rpc.shutdown(timeout=LIMIT_S * 10)
    _over.set()
    return kept.lines


def test_a_shutdown_that_all_came_to_names_the_calls_that_do_not_end(cluster: Cluster) -> None:
    """It goes on without them: the caller names the callee, and the callee the caller."""
    here, there = cluster.run(end_with_calls, 2, args=(cluster.new_init_method(),), init=False)
    assert any("these are under way" in line and "of hold_here for worker1, for " in line for line in here), here
    assert any("these are under way" in line and "of hold_here to worker0, for " in line for line in there), there
