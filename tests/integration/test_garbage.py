"""Calls leave no reference cycles: what is in one keeps its tensors, and shared memory, until a garbage collection."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import torch

import zrpc as rpc
import zrpc.autograd

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

CALLS = 50
SETTLE_S = 10.0


def echo(value: Any) -> Any:
    return value


def _python() -> None:
    rpc.rpc_sync("worker1", echo, args=({"x": torch.ones(4)},))


def _operator() -> None:
    rpc.rpc_sync("worker1", torch.add, args=(torch.ones(4), 1), kwargs={"alpha": 2})


def _future() -> None:
    rpc.rpc_async("worker1", echo, args=(torch.ones(4),)).wait()


def _reference() -> None:
    rpc.remote("worker1", echo, args=(torch.ones(4),)).to_here()


def _backward() -> None:
    leaf = torch.ones(4, requires_grad=True)
    with zrpc.autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", torch.add, args=(leaf, leaf)).sum()
        zrpc.autograd.backward(context_id, [loss])
        assert zrpc.autograd.get_gradients(context_id)[leaf].tolist() == [2.0] * 4


KINDS: tuple[Callable[[], None], ...] = (_python, _operator, _future, _reference, _backward)


def _unreachable() -> int:
    """How many objects only cycles keep here, with automatic collection off from now on."""
    gc.disable()
    return gc.collect()


def collect_after_calls(rank: int) -> dict[str, tuple[int, int]]:
    """Objects in cycles after `CALLS` calls of each kind, on the caller and on the callee."""
    found: dict[str, tuple[int, int]] = {}
    if rank:
        return found
    for kind in KINDS:
        for _ in range(2):  # what the first calls of all leave does not count
            _collect_both()
            for _ in range(CALLS):
                kind()
            _let_settle()
        found[kind.__name__] = _collect_both()
    return found


def _collect_both() -> tuple[int, int]:
    return _unreachable(), rpc.rpc_sync("worker1", _unreachable)


def _let_settle() -> None:
    """Wait until references and contexts that were dropped are told of."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and rpc.rpc_sync("worker1", _contexts):
        time.sleep(0.01)


def _contexts() -> int:
    count: int = zrpc.autograd._get_debug_info()["num_autograd_contexts"]
    return count


def test_calls_leave_no_reference_cycles(cluster: Cluster) -> None:
    for kind, (here, there) in cluster.run(collect_after_calls, 2)[0].items():
        assert here < CALLS, f"{kind} leaves {here} objects in cycles at the caller"
        assert there < CALLS, f"{kind} leaves {there} objects in cycles at the callee"
