"""One call to several workers."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration.test_many_buffers import are_equal, mixed
from zrpc.autograd import backward, context, get_gradients
from zrpc.errors import PeerLostError, RpcTimeoutError, SerializationError, UnknownWorkerError

if TYPE_CHECKING:
    import numpy as np

    from tests.integration.harness import Cluster

WORLD = 4
OTHERS = [f"worker{rank}" for rank in range(1, WORLD)]
_kept: list[Any] = []
_may_end = threading.Event()


def check_and_change(seed: int, values: dict[str, Any]) -> int:
    """Every tensor is as it was sent, and is written to then."""
    assert are_equal(values, mixed(seed))
    for value in values.values():
        if isinstance(value, torch.Tensor):
            value.detach().fill_(rpc.get_worker_info().id)
    return int(rpc.get_worker_info().id)


def keep(weights: torch.Tensor, array: np.ndarray[Any, Any]) -> str:
    weights += rpc.get_worker_info().id
    array += rpc.get_worker_info().id
    _kept.append((weights, array))
    return str(rpc.get_worker_info().name)


def kept_are(values: list[float]) -> bool:
    try:
        return all(
            bool(
                (weights == value + rpc.get_worker_info().id).all()
                and (array == value + rpc.get_worker_info().id).all()
            )
            for (weights, array), value in zip(_kept, values, strict=True)
        )
    finally:
        _kept.clear()


def fail_on(rank: int, values: torch.Tensor) -> float:
    if rpc.get_worker_info().id == rank:
        raise KeyError("not here")
    return float(values.sum())


def wait_told(values: torch.Tensor) -> bool:
    return _may_end.wait(60)


def owner_value(ref: rpc.RRef[torch.Tensor], more: torch.Tensor) -> float:
    return float(ref.to_here().sum() + more.sum())


def scaled(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return x * weights


def wait(futures: list[Any]) -> list[Any]:
    return [future.wait() for future in futures]


def call_all(rank: int) -> None:
    if rank:
        return
    for seed in range(4):
        assert wait(rpc.broadcast(OTHERS, check_and_change, args=(seed, mixed(seed)))) == [1, 2, 3]
    sent = [torch.full((1 << 18,), float(value)) for value in range(12)]
    for weights in sent:
        got = rpc.broadcast(OTHERS, keep, args=(weights,), kwargs={"array": weights.numpy()})
        assert wait(got) == OTHERS
        assert bool((weights == weights[0]).all()), "the caller's own stays as it is"
    values = [float(weights[0]) for weights in sent]
    assert all(wait(rpc.broadcast(OTHERS, kept_are, args=(values,))))

    assert wait(rpc.broadcast([1, rpc.get_worker_info("worker2")], torch.add, args=(torch.ones(9), 1)))[1].sum() == 18
    assert (
        wait(rpc.broadcast(iter(["worker3", "worker3", "worker0"]), fail_on, args=(9, torch.ones(1 << 17))))
        == [float(1 << 17)] * 3
    )
    assert rpc.broadcast([], fail_on, args=(9, torch.ones(5))) == []
    assert wait(rpc.broadcast(["worker1"], fail_on, args=(9, torch.ones(5)))) == [5.0]


def test_each_worker_gets_what_was_sent_and_may_write_to_its_own(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(call_all, WORLD)


def test_so_it_does_through_sockets(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(call_all, WORLD, shared_memory=False)


def fail_some(rank: int) -> None:
    if rank:
        return
    values = torch.ones(1 << 17)
    one, two, three = rpc.broadcast(OTHERS, fail_on, args=(2, values))
    assert one.wait() == three.wait() == float(1 << 17)
    with pytest.raises(KeyError, match="not here"):
        two.wait()
    futures = rpc.broadcast(OTHERS, wait_told, args=(values,), timeout=0.2)
    for future in futures:
        with pytest.raises(RpcTimeoutError):
            future.wait()
    wait(rpc.broadcast(OTHERS, _may_end_now))
    with pytest.raises(UnknownWorkerError, match="nobody"):
        rpc.broadcast(["worker1", "nobody"], fail_on, args=(9, values))
    with pytest.raises(TypeError, match=r"several, as in \['worker1', 'worker2'\]"):
        rpc.broadcast("worker1", fail_on, args=(9, values))
    with pytest.raises(TypeError, match="callable"):
        rpc.broadcast(OTHERS, 5)  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match="lock"):
        rpc.broadcast(OTHERS, fail_on, args=(9, threading.Lock()))
    assert wait(rpc.broadcast(OTHERS, fail_on, args=(9, values))) == [float(1 << 17)] * 3


def _may_end_now() -> None:
    _may_end.set()


def test_each_call_has_an_end_of_its_own(cluster_in_each_mode: Cluster) -> None:
    """Errors, time limits and what cannot be sent."""
    cluster_in_each_mode.run(fail_some, WORLD)


def send_what_each_needs_for_itself(rank: int) -> None:
    """RRefs and tensors that require grad: a fork, and a part of the graph, for each callee."""
    if rank:
        return
    ref = rpc.RRef(torch.ones(1 << 16))
    assert wait(rpc.broadcast(OTHERS, owner_value, args=(ref, torch.ones(1 << 16)))) == [float(2 << 16)] * 3
    weights = torch.ones(3, requires_grad=True)
    with context() as context_id:
        outputs = wait(rpc.broadcast(OTHERS, scaled, args=(torch.full((3,), 2.0), weights)))
        backward(context_id, [sum(output.sum() for output in outputs)])
        assert get_gradients(context_id)[weights].tolist() == [6.0] * 3


def test_rrefs_and_gradients_work_as_in_calls_to_one(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(send_what_each_needs_for_itself, WORLD)


def die_on(rank: int, values: torch.Tensor) -> float:
    if rpc.get_worker_info().id == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(values.sum())


def lose_one(rank: int, init_method: str) -> list[str] | None:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=WORLD, rpc_backend_options=options)
    outcomes = []
    if rank:
        assert _may_end.wait(60)
    else:
        for future in rpc.broadcast(OTHERS, die_on, args=(2, torch.ones(1 << 17))):
            try:
                outcomes.append(str(future.wait()))
            except PeerLostError as error:
                outcomes.append(type(error).__name__)
        alive = ["worker1", "worker3"]
        for value in range(20):
            values = torch.full((1 << 17,), float(value))
            assert wait(rpc.broadcast(alive, die_on, args=(2, values))) == [float(value << 17)] * 2
        wait(rpc.broadcast(alive, _may_end_now))
    rpc.shutdown(graceful=False)
    return outcomes


def test_a_callee_that_dies_takes_nothing_from_the_others(cluster_in_each_mode: Cluster) -> None:
    outcomes = cluster_in_each_mode.start(
        lose_one, WORLD, args=(cluster_in_each_mode.new_init_method(),), init=False
    ).wait(150)
    assert outcomes[0].error is None
    total = str(float(1 << 17))
    assert outcomes[0].result == [total, "PeerLostError", total]
    assert [outcome.error for outcome in outcomes if outcome.rank != 2] == [None] * 3
