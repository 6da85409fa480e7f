"""`async def` functions as callees."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc import autograd, errors
from zrpc.agent.current import current_agent

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

MANY = 3000
_under_way: list[int] = []
_events: list[asyncio.Event] = []


async def double(x: Any) -> Any:
    await asyncio.sleep(0)
    return x * 2


async def fail(text: str) -> None:
    await asyncio.sleep(0)
    raise LookupError(text)


async def leave() -> None:
    raise SystemExit(3)


async def cancel_itself() -> None:
    raise asyncio.CancelledError("of its own")


async def wait_for_all(number: int) -> int:
    """Ends when `MANY` are under way, all at once."""
    if not _events:
        _events.append(asyncio.Event())
    _under_way.append(number)
    if len(_under_way) == MANY:
        _events[0].set()
    await _events[0].wait()
    return number


@rpc.functions.async_execution
async def marked(x: int) -> int:
    return 2 * x


async def thread_name() -> str:
    return threading.current_thread().name


async def ask_back(to: str, x: Any) -> Any:
    first = await rpc.rpc_async(to, double, args=(x,))
    both = await asyncio.gather(rpc.rpc_async(to, double, args=(first,)), rpc.rpc_async(to, torch.add, args=(x, 1)))
    return both


class Model:
    def __init__(self) -> None:
        self.weight = torch.ones(3)

    async def forward(self, x: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        return self.weight * x

    @staticmethod
    async def static(x: int) -> int:
        return x + 1


def other(rank: int) -> str:
    return f"worker{1 - rank}"


def call(rank: int) -> None:
    to = other(rank)
    assert rpc.rpc_sync(to, double, args=(21,)) == 42
    large = torch.arange(500_000)
    assert torch.equal(rpc.rpc_async(to, double, args=(large,)).wait(), large * 2)
    assert torch.equal(rpc.remote(to, double, args=(large,)).to_here(), large * 2)
    assert rpc.rpc_sync(f"worker{rank}", double, args=(4,)) == 8
    assert rpc.rpc_sync(to, Model.static, args=(1,)) == 2
    model = rpc.remote(to, Model)
    assert torch.equal(model.rpc_sync().forward(torch.ones(3)), torch.ones(3))
    assert torch.equal(model.rpc_async().forward(torch.ones(3)).wait(), torch.ones(3))
    assert torch.equal(model.remote().forward(torch.ones(3)).to_here(), torch.ones(3))
    assert rpc.rpc_sync(to, thread_name) == "zrpc-event-loop"
    back = rpc.rpc_sync(to, ask_back, args=(f"worker{rank}", torch.ones(2)))
    assert torch.equal(back[0], torch.full((2,), 4.0))
    assert torch.equal(back[1], torch.full((2,), 2.0))
    with pytest.raises(LookupError, match="nothing here"):
        rpc.rpc_sync(to, fail, args=("nothing here",))
    with pytest.raises(LookupError, match="nothing here"):
        rpc.remote(to, fail, args=("nothing here",)).to_here()
    with pytest.raises(RuntimeError, match="SystemExit"):
        rpc.rpc_sync(to, leave)
    with pytest.raises(errors.CallCancelledError, match="cancelled at its worker"):
        rpc.rpc_sync(to, cancel_itself)
    with pytest.raises(RuntimeError, match="this one returned a coroutine"):
        rpc.rpc_sync(to, marked, args=(1,))
    assert rpc.rpc_sync(to, double, args=(21,)) == 42, "the loop goes on"


def test_an_async_def_function_may_be_called_like_any_other(cluster_in_each_mode: Cluster) -> None:
    """By all three calls, as a method of an RRef, with errors, and calling others itself."""
    cluster_in_each_mode.run(call, 2)


def call_many(rank: int) -> None:
    if rank == 0:
        calls = [rpc.rpc_async("worker1", wait_for_all, args=(number,)) for number in range(MANY)]
        assert [each.wait() for each in calls] == list(range(MANY))
        threads = rpc.rpc_sync("worker1", num_threads)
        assert threads < 30, "they need no threads"


def num_threads() -> int:
    return threading.active_count()


def test_thousands_of_them_are_under_way_at_once(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(call_many, 2, num_worker_threads=2)


async def multiply(to: str, x: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        await asyncio.sleep(0)  # others run in between, in other contexts
        x = await rpc.rpc_async(to, torch.mul, args=(x, 2.0))
    return x * 3


def differentiate(rank: int) -> None:
    results: dict[int, torch.Tensor] = {}
    weights = {n: torch.ones(4, requires_grad=True) for n in range(6)}

    def work(n: int) -> None:
        with autograd.context() as context_id:
            loss = rpc.rpc_sync(other(rank), multiply, args=(f"worker{rank}", weights[n], n)).sum()
            autograd.backward(context_id, [loss])
            results[n] = autograd.get_gradients(context_id)[weights[n]]

    threads = [threading.Thread(target=work, args=(n,)) for n in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in weights:
        assert torch.equal(results[n], torch.full((4,), 3.0 * 2.0**n)), n


def test_each_goes_on_in_the_autograd_context_of_its_call(cluster_in_each_mode: Cluster) -> None:
    """Several interleave on the loop; gradients of each come through the calls that it awaited."""
    cluster_in_each_mode.run(differentiate, 2)


@rpc.expose
async def exposed(x: int) -> int:
    await asyncio.sleep(0)
    return x + 1


def call_exposed(rank: int) -> None:
    assert rpc.rpc_sync(other(rank), exposed, args=(1,)) == 2
    assert rpc.remote(other(rank), exposed, args=(1,)).to_here() == 2
    with pytest.raises(errors.NotAllowedError):
        rpc.rpc_sync(other(rank), double, args=(1,))


def test_those_that_are_exposed_may_be_called_where_nothing_else_may(cluster: Cluster) -> None:
    cluster.run(call_exposed, 2, allow="registered")


_seen: list[str] = []


async def never_end() -> None:
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        _seen.append("cancelled")
        raise


def end_at_once(rank: int, method: str) -> None:
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        future = rpc.rpc_async("worker1", never_end, timeout=0)
        with pytest.raises(errors.ZrpcError):  # it is told, or its callee is lost
            future.wait()
    else:
        until(lambda: current_agent().counts()["server_active_async_calls"] == 1, "it runs")
    rpc.shutdown(graceful=False)
    assert _seen == (["cancelled"] if rank else [])
    assert not [thread for thread in threading.enumerate() if thread.name == "zrpc-event-loop"]


def test_those_that_run_are_cancelled_when_their_worker_shuts_down_at_once(cluster_in_each_mode: Cluster) -> None:
    """The event loop's thread has ended when `shutdown` returns."""
    cluster_in_each_mode.run(end_at_once, 2, args=(cluster_in_each_mode.new_init_method(),), init=False)
