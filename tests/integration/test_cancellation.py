"""Calls are called off: by their callers, by time limits, and with the calls that they were made for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration import busy
from tests.waiting import until
from zrpc import autograd, errors
from zrpc.agent.current import current_agent
from zrpc.autograd import _get_debug_info as debug_info
from zrpc.rref.context import RRefContext

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

SEED = 20
LIMIT_S = 2.0
"""Long enough for a call to begin, whatever else runs on the machine."""
_ran: list[Any] = []
_seen: list[Any] = []
_may_end = threading.Event()


def note(value: Any = None, *_: Any) -> Any:
    _ran.append(value)
    return value


def what_ran() -> list[Any]:
    return list(_ran)


def what_was_seen() -> list[Any]:
    return list(_seen)


def run_until_cancelled(mark: Any = "cancelled") -> None:
    _seen.extend(("begun", ("begun", mark)))
    until(rpc.is_cancelled, "this call is cancelled")
    _seen.append(mark)


def await_seen(to: str, *marks: Any) -> None:
    until(lambda: set(marks) <= set(rpc.rpc_sync(to, what_was_seen)), f"{to} has seen {marks}")


def local_counts() -> dict[str, int]:
    return current_agent().counts()


def rref_counts() -> dict[str, str]:
    context: RRefContext = current_agent().extensions[RRefContext]
    return context.debug_info()


def await_nothing_kept(*workers: str) -> None:
    """No worker of these counts an RRef, or a call that is under way, but this very one."""
    for to in workers:
        until(lambda to=to: rpc.rpc_sync(to, rref_counts)["num_owner_rrefs"] == "0", f"{to} owns nothing")  # type: ignore[misc]
        until(lambda to=to: rpc.rpc_sync(to, local_counts)["server_active_calls"] == 1, f"{to} serves this only")  # type: ignore[misc]
    until(lambda: local_counts()["client_active_calls"] == 0, "no call is under way")


# ---- what was not begun ------------------------------------------------------------------------------------------


def cancel_queued(rank: int, folder: str) -> None:
    if rank:
        busy.attend(folder)
        return
    kept = busy.occupied("worker1", folder)
    ahead = busy.queued(folder)
    calls = [rpc.rpc_async("worker1", note, args=(number,)) for number in range(20)]
    busy.await_queued(folder, ahead + 20)
    assert all(call.cancel() for call in calls[::2])
    for call in calls[::2]:
        with pytest.raises(errors.CallCancelledError, match=r"PythonCall to .*worker1.* was cancelled"):
            call.wait()
        with pytest.raises(concurrent.futures.CancelledError):
            call.wait()
        assert call.cancelled()
        assert not call.cancel(), "it is done already"
    busy.await_queued(folder, ahead + 10)
    busy.let_go(folder)
    assert [call.wait() for call in calls[1::2]] == list(range(1, 20, 2))
    assert not calls[1].cancel()
    assert not calls[1].cancelled()
    torch.futures.wait_all(kept)
    assert sorted(rpc.rpc_sync("worker1", what_ran)) == list(range(1, 20, 2))
    assert rpc.rpc_sync("worker1", local_counts)["server_cancelled_calls"] == 10
    await_nothing_kept("worker1")


def test_a_call_that_is_cancelled_while_it_waits_never_runs(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """It leaves the callee's queue at once, though no thread there is free."""
    cluster_in_each_mode.run(cancel_queued, 2, args=(str(tmp_path),), num_worker_threads=busy.THREADS)


def expire_queued(rank: int, folder: str) -> None:
    if rank:
        busy.attend(folder)
        return
    kept = busy.occupied("worker1", folder)
    ahead = busy.queued(folder)
    calls = [rpc.rpc_async("worker1", note, timeout=0.5) for _ in range(10)]
    with pytest.raises(errors.RpcTimeoutError):
        rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1), timeout=0.1)
    for call in calls:
        with pytest.raises(errors.RpcTimeoutError):
            call.wait()
        assert not call.cancelled()
    busy.await_queued(folder, ahead)
    busy.let_go(folder)
    torch.futures.wait_all(kept)
    assert rpc.rpc_sync("worker1", what_ran) == []
    await_nothing_kept("worker1")


def test_a_call_whose_time_is_over_while_it_waits_never_runs(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    cluster_in_each_mode.run(expire_queued, 2, args=(str(tmp_path),), num_worker_threads=busy.THREADS)


def cancel_with_references(rank: int, folder: str) -> None:
    if rank == 1:
        busy.attend(folder)
    if rank:
        return
    kept = busy.occupied("worker1", folder)
    mine, theirs = rpc.RRef(torch.ones(3)), rpc.remote("worker2", torch.ones, args=(3,))
    theirs.to_here()
    with autograd.context() as context_id:
        weight = torch.ones(100, requires_grad=True)
        calls = [rpc.rpc_async("worker1", note, args=(1, mine, theirs, weight * 2)) for _ in range(10)]
        assert all(call.cancel() for call in calls)
        loss = rpc.rpc_sync("worker2", torch.mul, args=(weight, 3)).sum()
        autograd.backward(context_id, [loss], mode="smart")  # FAST waits for gradients of all that was sent
        assert torch.equal(autograd.get_gradients(context_id)[weight], torch.full((100,), 3.0))
    busy.let_go(folder)
    torch.futures.wait_all(kept)
    del mine, theirs
    until(lambda: rref_counts()["num_owner_rrefs"] == "0", "nothing counts this worker's RRef", rref_counts)
    await_nothing_kept("worker1", "worker2")
    assert rpc.rpc_sync("worker1", what_ran) == []
    until(lambda: rpc.rpc_sync("worker1", num_contexts) == 0, "the context is gone")


def num_contexts() -> int:
    return int(debug_info()["num_autograd_contexts"])


def test_what_a_cancelled_call_carried_is_given_up(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """RRefs of the caller and of a third worker, and tensors that require grad, within an autograd context."""
    cluster_in_each_mode.run(cancel_with_references, 3, args=(str(tmp_path),), num_worker_threads=busy.THREADS)


def expire_creation(rank: int, folder: str) -> None:
    if rank == 1:
        busy.attend(folder)
    if rank:
        return
    kept = busy.occupied("worker1", folder)
    ahead = busy.queued(folder)
    made = rpc.remote("worker1", note, timeout=1.0)
    built = rpc.remote("worker1", torch.ones, args=(2,), timeout=1.0)
    asked = [rpc.rpc_async("worker2", fetch, args=(made,)), rpc.rpc_async("worker2", fetch, args=(built,))]
    until(lambda: busy.counts(folder)["server_cancelled_calls"] == 2, "both creations came, and are dropped")
    busy.await_queued(folder, ahead)
    busy.let_go(folder)  # it answers on a thread of its own
    for future in asked:
        with pytest.raises(errors.ZrpcError, match=r"was cancelled before it began"):
            future.wait()
    with pytest.raises(RuntimeError, match="timed out"):
        made.to_here()
    torch.futures.wait_all(kept)
    del made, built, asked, future
    await_nothing_kept("worker1", "worker2")
    assert rpc.rpc_sync("worker1", what_ran) == []


def fetch(rref: Any) -> Any:
    return rref.to_here(timeout=0)


def test_a_creation_that_is_not_begun_fails_for_all_who_have_its_rref(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """Its time was over while it waited. A third worker that asks for the value is answered, and nothing is kept."""
    cluster_in_each_mode.run(expire_creation, 3, args=(str(tmp_path),), num_worker_threads=busy.THREADS)


# ---- what runs ---------------------------------------------------------------------------------------------------


def cancel_running(rank: int) -> None:
    if rank:
        return
    assert not rpc.is_cancelled()
    assert rpc.time_remaining() is None
    running = rpc.rpc_async("worker1", run_until_cancelled)
    await_seen("worker1", "begun")
    assert running.cancel()
    await_seen("worker1", "cancelled")
    with pytest.raises(errors.RpcTimeoutError):
        rpc.rpc_sync("worker1", run_until_cancelled, args=("time is over",), timeout=LIMIT_S)
    await_seen("worker1", "time is over")
    with pytest.raises(errors.RpcTimeoutError):
        rpc.rpc_async("worker1", run_until_cancelled, args=("also",), timeout=LIMIT_S).wait()
    await_seen("worker1", "also")
    made = rpc.remote("worker1", run_until_cancelled, args=("creation",), timeout=LIMIT_S)
    await_seen("worker1", "creation")
    del made
    pressed = threading.Timer(LIMIT_S, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    with pytest.raises(KeyboardInterrupt):
        rpc.rpc_sync("worker1", run_until_cancelled, args=("interrupted",))
    pressed.join()
    await_seen("worker1", "interrupted")
    await_nothing_kept("worker1")


def test_a_function_learns_that_nothing_waits_for_it_any_more(cluster_in_each_mode: Cluster) -> None:
    """Cancelled, out of time, or its caller was interrupted with Ctrl-C."""
    cluster_in_each_mode.run(cancel_running, 2)


def end() -> None:
    _may_end.set()


def wait_for_end() -> str:
    assert _may_end.wait(busy.WAIT_S)
    _seen.append(rpc.is_cancelled())
    return "done"


def drop_future(rank: int) -> None:
    if rank:
        return
    rpc.rpc_async("worker1", wait_for_end)
    rpc.rpc_sync("worker1", end)
    await_seen("worker1", False)


def test_a_future_that_is_dropped_cancels_nothing(cluster: Cluster) -> None:
    cluster.run(drop_future, 2)


def cancel_others(rank: int) -> None:
    if rank:
        return
    chained = rpc.rpc_async("worker1", run_until_cancelled, args=("then",)).then(lambda done: done.wait())
    await_seen("worker1", ("begun", "then"))
    assert chained.cancel()
    await_seen("worker1", "then")
    with pytest.raises(errors.CallCancelledError):
        chained.wait()
    several = [rpc.rpc_async("worker1", run_until_cancelled, args=(mark,)) for mark in ("one", "two")]
    await_seen("worker1", ("begun", "one"), ("begun", "two"))
    collected: Any = torch.futures.collect_all(several)
    assert collected.cancel()
    await_seen("worker1", "one", "two")
    with pytest.raises(errors.CallCancelledError):
        collected.wait()
    late = rpc.remote("worker1", wait_for_end)
    fetches = [late.to_here_async() for _ in range(100)]
    assert all(fetch.cancel() for fetch in fetches)
    until(lambda: rpc.rpc_sync("worker1", local_counts)["server_active_calls"] == 2, "only the creation is served")
    rpc.rpc_sync("worker1", end)
    assert late.to_here() == "done"
    there = rpc.remote("worker1", Runner)
    begun = there.rpc_async().run("method")
    await_seen("worker1", ("begun", "method"))
    assert begun.cancel()
    await_seen("worker1", "method")
    assert not rpc.Future().cancel(), "it is of no call"


class Runner:
    def run(self, mark: str) -> None:
        run_until_cancelled(mark)


def test_futures_of_other_kinds_cancel_what_they_wait_for(cluster_in_each_mode: Cluster) -> None:
    """Those of `then`, `collect_all`, `to_here_async` and of an RRef's methods."""
    cluster_in_each_mode.run(cancel_others, 2)


# ---- nested calls ------------------------------------------------------------------------------------------------


ROUNDED_S = 0.001
"""What is left travels in milliseconds, rounded up."""


def remaining() -> float | None:
    return rpc.time_remaining()


def remaining_nested(to: str, timeout: float) -> tuple[float | None, float | None]:
    own = rpc.time_remaining()
    return own, rpc.rpc_sync(to, remaining, timeout=timeout)


@rpc.functions.async_execution
def remaining_later(to: str) -> Any:
    first = rpc.rpc_async(to, remaining, timeout=0)
    return first.then(lambda done: (done.wait(), rpc.time_remaining(), rpc.rpc_sync(to, remaining, timeout=0)))


async def remaining_in_task(to: str) -> tuple[float | None, float | None]:
    own = rpc.time_remaining()
    return own, await rpc.rpc_async(to, remaining, timeout=0)


def inherit(rank: int) -> None:
    if rank:
        return
    assert rpc.rpc_sync("worker1", remaining, timeout=0) is None
    assert rpc.rpc_sync("worker1", remaining_nested, args=("worker2", 0), timeout=0) == (None, None)
    for function, args in ((remaining_nested, ("worker2", 0)), (remaining_in_task, ("worker2",))):
        own, nested = rpc.rpc_sync("worker1", function, args=args, timeout=50)
        assert 0 < nested <= own + ROUNDED_S <= 51
    own, nested = rpc.rpc_sync("worker1", remaining_nested, args=("worker2", 20), timeout=50)
    assert nested <= 20 < own
    first, own, nested = rpc.rpc_sync("worker1", remaining_later, args=("worker2",), timeout=50)
    assert 0 < nested <= own + ROUNDED_S <= first + 2 * ROUNDED_S <= 51


def test_nested_calls_have_no_more_time_than_is_left(cluster_in_each_mode: Cluster) -> None:
    """In functions, coroutines and callbacks of `then`; a time limit of 0 (none) is bounded too."""
    cluster_in_each_mode.run(inherit, 3)


def not_inherited(rank: int) -> None:
    if rank == 0:
        assert rpc.rpc_sync("worker1", remaining_nested, args=("worker2", 0), timeout=50) == (None, None)
        with pytest.raises(errors.RpcTimeoutError):
            rpc.rpc_sync("worker1", wait_for_end, timeout=0.1)
        rpc.rpc_sync("worker1", end)
        await_seen("worker1", False)


def test_time_limits_stay_at_the_caller_if_an_option_says_so(cluster: Cluster) -> None:
    cluster.run(not_inherited, 3, propagate_deadlines=False)


def pass_on(to: list[str], mark: str) -> None:
    try:
        if len(to) > 1:
            rpc.rpc_sync(to[0], pass_on, args=(to[1:], mark))
        else:
            rpc.rpc_sync(to[0], run_until_cancelled, args=(mark,))
    except (errors.CallCancelledError, errors.RpcTimeoutError) as error:
        _seen.append((mark, type(error)))
        raise


async def pass_on_in_task(to: list[str], mark: str) -> None:
    try:
        await rpc.rpc_async(to[0], pass_on, args=(to[1:], mark))
    except asyncio.CancelledError:
        _seen.append(mark)
        raise


@rpc.functions.async_execution
def pass_on_later(to: list[str], mark: str) -> Any:
    return rpc.rpc_async(to[0], remaining).then(lambda _: rpc.rpc_sync(to[0], pass_on, args=(to[1:], mark)))


def cancel_chain(rank: int) -> None:
    if rank:
        return
    for mark, function in (("sync", pass_on), ("task", pass_on_in_task), ("later", pass_on_later)):
        before = rpc.rpc_sync("worker3", what_was_seen).count("begun")
        head = rpc.rpc_async("worker1", function, args=(["worker2", "worker3"], mark))
        until(lambda n=before: rpc.rpc_sync("worker3", what_was_seen).count("begun") > n, "the last one runs")  # type: ignore[misc]
        assert head.cancel()
        await_seen("worker3", mark)
        await_seen("worker2", (mark, errors.CallCancelledError))
    await_seen("worker1", ("sync", errors.CallCancelledError), "task")
    with pytest.raises(errors.RpcTimeoutError):
        rpc.rpc_sync("worker1", pass_on, args=(["worker2", "worker3"], "limit"), timeout=LIMIT_S)
    await_seen("worker3", "limit")
    await_nothing_kept("worker1", "worker2", "worker3")


def test_a_cancelled_call_cancels_those_that_it_led_to(cluster_in_each_mode: Cluster) -> None:
    """Over four workers, in functions, coroutines and callbacks; what runs out of time likewise."""
    cluster_in_each_mode.run(cancel_chain, 4)


# ---- asyncio -----------------------------------------------------------------------------------------------------


async def sleep(mark: str) -> None:
    _seen.append(("begun", mark))
    try:
        await asyncio.sleep(busy.WAIT_S)
    except asyncio.CancelledError:
        _seen.append(mark)
        raise


def cancel_tasks(rank: int) -> None:
    if rank:
        return

    async def main() -> None:
        task = asyncio.ensure_future(awaiting(rpc.rpc_async("worker1", sleep, args=("by its task",))))
        await asyncio.to_thread(await_seen, "worker1", ("begun", "by its task"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(rpc.rpc_async("worker1", sleep, args=("by wait_for",)), LIMIT_S)
        called = rpc.rpc_async("worker1", sleep, args=("by its future",))
        waiting = asyncio.ensure_future(awaiting(called))
        await asyncio.to_thread(await_seen, "worker1", ("begun", "by its future"))
        assert called.cancel()
        with pytest.raises(errors.CallCancelledError):
            await waiting

    asyncio.run(main())
    await_seen("worker1", "by its task", "by wait_for", "by its future")
    with pytest.raises(errors.RpcTimeoutError):
        rpc.rpc_sync("worker1", sleep, args=("by its time limit",), timeout=LIMIT_S)
    made = rpc.remote("worker1", sleep, args=("as a creation",), timeout=LIMIT_S)
    await_seen("worker1", "by its time limit", "as a creation")
    with pytest.raises(RuntimeError, match="timed out"):
        made.to_here()
    del made
    await_nothing_kept("worker1")


async def awaiting(future: Any) -> Any:
    return await future


def test_a_cancelled_asyncio_task_cancels_its_call_and_the_coroutine_there(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(cancel_tasks, 2)


# ---- many --------------------------------------------------------------------------------------------------------

WINDOW = 256


def cancel_many(rank: int) -> None:
    if rank:
        return
    rref = rpc.RRef(torch.ones(2))
    for start in range(0, 10_000, WINDOW // 2):
        calls = [rpc.rpc_async("worker1", note, args=(start + n, rref)) for n in range(WINDOW // 2)]
        for call in calls:
            call.cancel()
    ran = rpc.rpc_sync("worker1", what_ran)
    assert len(ran) == len(set(ran)), "none ran twice"
    until(lambda: rref_counts()["num_owner_rrefs"] == "0", "no fork is counted any more", rref_counts)
    await_nothing_kept("worker1")
    full = [rpc.rpc_async("worker1", note, args=(-n,), timeout=20) for n in range(1, WINDOW)]
    assert torch.futures.wait_all(full) == [-n for n in range(1, WINDOW)], "the window has its room again"


def test_ten_thousand_cancelled_calls_leave_nothing_behind(cluster_in_each_mode: Cluster) -> None:
    """Each carries an RRef. Neither calls nor forks are kept, and the window of 256 calls is as wide as before."""
    cluster_in_each_mode.run(cancel_many, 2, max_in_flight_calls=WINDOW)


def race(rank: int) -> None:
    if rank:
        return
    chance = random.Random(SEED)
    answered, cancelled = set(), set()
    under_way: list[tuple[int, Any]] = []
    for number in range(3000):
        under_way.append((number, rpc.rpc_async("worker1", note, args=(number,))))
        while len(under_way) > chance.randrange(1, 20):
            taken, call = under_way.pop(chance.randrange(len(under_way)))
            (cancelled if chance.random() < 0.5 and call.cancel() else answered).add(taken)
            try:
                assert call.wait() == taken
                assert taken in answered
            except errors.CallCancelledError:
                assert taken in cancelled
    for number, call in under_way:
        assert call.wait() == number
        answered.add(number)
    ran = rpc.rpc_sync("worker1", what_ran)
    assert len(ran) == len(set(ran)), "none ran twice"
    assert answered <= set(ran), "what was answered ran"
    await_nothing_kept("worker1")


def test_a_cancel_that_meets_the_answer_changes_nothing(cluster_in_each_mode: Cluster) -> None:
    """Each call is either cancelled or answered, whichever came first, and runs once at most."""
    cluster_in_each_mode.run(race, 2)
