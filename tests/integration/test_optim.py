"""Distributed optimizers: steps on one worker follow one another, and none waits for itself."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
import zrpc.autograd as dist_autograd
from zrpc.autograd.wiring import current_service
from zrpc.optim import DistributedOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

NUM_THREADS = 2
"""Handler threads of each worker here."""

_go_on = threading.Event()
_has_begun = threading.Event()
_weights: dict[str, torch.Tensor] = {}
_hooks: list[Callable[[], Any]] = []
"""What the step calls before anything else."""
_running = 0
_most_running = 0


def weight() -> torch.Tensor:
    return _weights.setdefault("weight", torch.zeros(2, requires_grad=True))


def loss(of: rpc.RRef[torch.Tensor]) -> torch.Tensor:
    return of.local_value().sum()


class Held(torch.optim.SGD):
    """Steps when it is told to."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # it is called with none
        global _running, _most_running
        _running += 1
        _most_running = max(_most_running, _running)
        _has_begun.set()
        assert _go_on.wait(60)
        super().step()
        _running -= 1


class Hooked(torch.optim.SGD):
    """Calls the hook that the test has left, once a step."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # it is called with none
        for hook in _hooks:
            hook()
        super().step()


def let_go() -> None:
    """Served while all steps wait."""
    assert _has_begun.wait(60)
    _go_on.set()


def state() -> tuple[torch.Tensor, int]:
    return weight().detach().clone(), _most_running


def train(optimizer: DistributedOptimizer, of: rpc.RRef[torch.Tensor]) -> None:
    active = current_service().contexts.find_current()
    if active is not None:  # of the step that this is called from
        optimizer.step(active.context_id)
        return
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [rpc.rpc_sync(of.owner(), loss, (of,))])
        optimizer.step(context_id)


def train_many_at_once(rank: int) -> tuple[torch.Tensor, int] | None:
    if rank:
        return None
    of = rpc.remote("worker1", weight)
    optimizer = DistributedOptimizer(Held, [of], 1.0)
    failures: list[BaseException] = []
    are_ready = threading.Barrier(4 * NUM_THREADS + 1)

    def one() -> None:
        try:
            with dist_autograd.context() as context_id:
                dist_autograd.backward(context_id, [rpc.rpc_sync("worker1", loss, (of,))])
                are_ready.wait()
                optimizer.step(context_id)
        except BaseException as error:
            failures.append(error)

    trainers = [threading.Thread(target=one) for _ in range(4 * NUM_THREADS)]
    for trainer in trainers:
        trainer.start()
    are_ready.wait()
    rpc.rpc_sync("worker1", let_go, timeout=30)
    for trainer in trainers:
        trainer.join()
    if failures:
        raise failures[0]
    return rpc.rpc_sync("worker1", state)


def test_steps_of_many_trainers_occupy_no_handler_threads_and_never_run_at_once(cluster_in_each_mode: Cluster) -> None:
    """More trainers step than there are handler threads: other calls are served, and each step has its turn."""
    (after, most), _ = cluster_in_each_mode.run(train_many_at_once, num_worker_threads=NUM_THREADS)
    assert torch.equal(after, torch.full((2,), -4.0 * NUM_THREADS))
    assert most == 1


def set_hook(hook: Callable[..., Any], *args: Any) -> None:
    def once() -> None:
        _hooks.clear()
        hook(*args)

    _hooks.append(once)


def set_endless_hook(hook: Callable[..., Any], *args: Any) -> None:
    _hooks.append(partial(hook, *args))


def train_by(worker: str, optimizer: DistributedOptimizer, of: rpc.RRef[torch.Tensor]) -> None:
    rpc.rpc_sync(worker, train, args=(optimizer, of))


def train_later_by(worker: str, optimizer: DistributedOptimizer, of: rpc.RRef[torch.Tensor]) -> None:
    rpc.rpc_async(worker, train_and_tell, args=(optimizer, of))


def step_with_hook(rank: int, setter: Callable[..., Any], *hook: Any) -> Any:
    if rank != 0:
        return None
    of = rpc.remote("worker1", weight)
    optimizer = DistributedOptimizer(Hooked, [of], 1.0)
    rpc.rpc_sync("worker1", setter, args=(*hook, optimizer, of))
    train(optimizer, of)
    return rpc.rpc_sync("worker1", weight).detach()


@pytest.mark.parametrize(
    "hook", [(train,), (train_by, "worker1"), (train_by, "worker2")], ids=["direct", "self", "over"]
)
def test_a_hook_may_step_an_optimizer_of_the_same_worker(cluster_in_each_mode: Cluster, hook: tuple[Any, ...]) -> None:
    """A hook of a step calls step of an optimizer on its own worker, itself or by calls: both steps are taken."""
    result, *_ = cluster_in_each_mode.run(step_with_hook, 3, args=(set_hook, *hook), rpc_timeout=30)
    assert torch.equal(result, torch.full((2,), -2.0))


@pytest.mark.parametrize("hook", [(train,), (train_by, "worker2")], ids=["direct", "over"])
def test_a_hook_that_steps_without_end_is_stopped(cluster: Cluster, hook: tuple[Any, ...]) -> None:
    """A hook calls step each time, so each step makes another one: the error says that."""
    with pytest.raises(AssertionError, match="optimizer steps run within each other"):
        cluster.run(step_with_hook, 3, args=(set_endless_hook, *hook), rpc_timeout=50)


def train_and_tell(optimizer: DistributedOptimizer, of: rpc.RRef[torch.Tensor]) -> None:
    train(optimizer, of)
    _go_on.set()


def step_later(rank: int) -> Any:
    if rank != 0:
        return None
    of = rpc.remote("worker1", weight)
    optimizer = DistributedOptimizer(Hooked, [of], 1.0)
    rpc.rpc_sync("worker1", set_hook, args=(train_later_by, "worker0", optimizer, of))
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [rpc.rpc_sync(of.owner(), loss, (of,))])
        optimizer.step(context_id)
        assert _go_on.wait(30)
    return rpc.rpc_sync("worker1", weight).detach()


def test_what_a_hook_starts_and_does_not_wait_for_has_its_turn(cluster: Cluster) -> None:
    """A hook starts a call that leads to a step, and goes on: no error, and both steps are taken."""
    result, _ = cluster.run(step_later, rpc_timeout=30)
    assert torch.equal(result, torch.full((2,), -2.0))
