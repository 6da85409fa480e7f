"""`rpc.session`: a worker for the length of a block."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from tests.waiting import until
from zrpc.agent.current import is_agent_set
from zrpc.errors import AlreadyInitializedError, RendezvousError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LIMIT_S = 60.0


def add(a: int, b: int) -> int:
    return a + b


def of(rank: int, method: str, rpc_timeout: float = LIMIT_S) -> rpc.session:
    options = rpc.RpcBackendOptions(init_method=method, rpc_timeout=rpc_timeout)
    return rpc.session(f"worker{rank}", rank, 2, options)


def run_plain(rank: int, method: str) -> int:
    with of(rank, method):
        assert is_agent_set()
        got = rpc.rpc_sync(f"worker{1 - rank}", add, args=(rank, 10))
        with pytest.raises(AlreadyInitializedError), of(rank, method):
            raise AssertionError("entered twice")
    assert not is_agent_set()
    return got


def test_a_block_is_a_worker_and_waits_for_the_others(cluster: Cluster) -> None:
    assert cluster.run(run_plain, 2, args=(cluster.new_init_method(),), init=False) == [10, 11]


def run_async(rank: int, method: str) -> list[int]:
    """The event loop goes on while the worker joins and leaves."""
    ticks: list[int] = []

    async def tick() -> None:
        while True:
            ticks.append(0)
            await asyncio.sleep(0.01)

    async def main() -> list[int]:
        ticking = asyncio.ensure_future(tick())
        before = threading.active_count()
        async with of(rank, method):
            got = [await rpc.rpc_async(f"worker{1 - rank}", add, args=(rank, 10))]
            got += await asyncio.gather(*(rpc.rpc_async(f"worker{1 - rank}", add, args=(n, n)) for n in range(50)))
            assert threading.active_count() > before
            joined = len(ticks)
        assert len(ticks) > joined > 1
        ticking.cancel()
        return got

    got = asyncio.run(main())
    assert not is_agent_set()
    return got


def test_an_asynchronous_block_lets_the_event_loop_go_on(cluster: Cluster) -> None:
    first, second = cluster.run(run_async, 2, args=(cluster.new_init_method(),), init=False)
    assert first == [10, *range(0, 100, 2)]
    assert second == [11, *range(0, 100, 2)]


def run_failing(rank: int, method: str) -> str:
    """Worker 0 fails at once; the other one is told, and does not wait for it."""
    try:
        with of(rank, method):
            if rank == 0:
                raise LookupError("of the program")
            until(lambda: not _answers("worker0"), "worker 0 is gone", within_s=LIMIT_S)
    except (LookupError, RuntimeError) as error:
        assert not is_agent_set()
        return type(error).__name__
    return "nothing"


def _answers(name: str) -> bool:
    try:
        return rpc.rpc_sync(name, add, args=(1, 1)) == 2
    except RuntimeError:
        return False


def test_a_block_that_raises_leaves_at_once_with_its_own_error(cluster: Cluster) -> None:
    assert cluster.run(run_failing, 2, args=(cluster.new_init_method(),), init=False)[0] == "LookupError"


def run_cancelled(_: int, method: str) -> None:
    """The other worker never comes."""

    async def join() -> None:
        async with of(0, method, rpc_timeout=3.0):
            raise AssertionError("it is not there")

    async def main() -> None:
        joining = asyncio.ensure_future(join())
        await asyncio.sleep(0.5)
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining
        assert not is_agent_set()
        with pytest.raises(RendezvousError):
            await join()

    asyncio.run(main())
    assert not is_agent_set()


def test_a_cancelled_block_leaves_no_worker_behind(cluster: Cluster) -> None:
    cluster.run(run_cancelled, 1, args=(cluster.new_init_method(),), init=False)
