"""A callee bounds the calls that wait for its threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration import busy
from zrpc import errors

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

LIMIT = 8
_ran: list[int] = []


def note(number: int) -> int:
    _ran.append(number)
    return number


def what_ran() -> list[int]:
    return list(_ran)


def fetch(rref: Any) -> Any:
    return rref.to_here()


def overload(rank: int, folder: str, refuses: bool) -> None:
    if rank == 1:
        busy.attend(folder)
    if rank:
        return
    kept = busy.occupied("worker1", folder)
    room = LIMIT - busy.queued(folder)
    calls = [rpc.rpc_async("worker1", note, args=(number,)) for number in range(room)]
    busy.await_queued(folder, LIMIT)
    if refuses:
        for _ in range(5):
            with pytest.raises(errors.OverloadedError, match=r"refused the call, which certainly did not run: 8 "):
                rpc.rpc_sync("worker1", note, args=(-1,))
        with pytest.raises(errors.OverloadedError, match="max_queued_calls"):
            rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1))
        made = rpc.remote("worker1", note, args=(-2,))
        asked = rpc.rpc_async("worker2", fetch, args=(made,))
        assert calls[0].cancel()
        busy.await_queued(folder, LIMIT - 1)
        calls[0] = rpc.rpc_async("worker1", note, args=(0,))  # there is room for one again
    else:
        calls += [rpc.rpc_async("worker1", note, args=(number,)) for number in range(room, 3 * room)]
        busy.await_queued(folder, LIMIT + 2 * room)
    busy.await_queued(folder, LIMIT + (0 if refuses else 2 * room))
    there = busy.counts(folder)
    assert (there["server_refused_calls"], there["server_over_limit_calls"]) == ((7, 7) if refuses else (0, 2 * room))
    busy.let_go(folder)
    if refuses:
        with pytest.raises(RuntimeError, match="refused the call"):
            asked.wait()
    assert [call.wait() for call in calls] == list(range(len(calls)))
    torch.futures.wait_all(kept)
    assert sorted(rpc.rpc_sync("worker1", what_ran)) == list(range(len(calls)))


@pytest.mark.parametrize("mode", ["refuse", "wait"])
def test_calls_over_the_limit_are_refused_at_once_or_wait_as_an_option_says(
    cluster_in_each_mode: Cluster, tmp_path: Path, mode: str
) -> None:
    """A refused one did not run, and the error names the worker and how many wait there. Both are counted."""
    cluster_in_each_mode.run(
        overload, 3, args=(str(tmp_path), mode == "refuse"),
        num_worker_threads=busy.THREADS, max_queued_calls=LIMIT, overload=mode,
    )  # fmt: skip
