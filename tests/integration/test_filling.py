"""A worker stands still while it fills shared memory of which its peer was told: nobody else has to wait for it."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc import autograd, errors
from zrpc.agent.current import current_agent
from zrpc.gather import all_gather
from zrpc.transport import slabs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.integration.harness import Cluster
    from zrpc.transport.filling import Fill
    from zrpc.transport.slabs import SlabPool

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")

NUMEL = 100_000
NBYTES = 4 * NUMEL
PATIENCE_S = 30.0

_is_held, _may_go = threading.Event(), threading.Event()


def hold_back() -> None:
    """From now on this worker stands still, until `let_go`, before it fills slabs with so many bytes."""
    memory = current_agent()._carrier._shared_memory
    assert memory is not None
    pool: SlabPool = memory._pool
    fill = pool.fill

    def held(later: Sequence[Fill]) -> None:
        if any(len(buffer) == NBYTES for _, buffer in later):
            _is_held.set()
            assert _may_go.wait(PATIENCE_S), "nobody lets it go"
        fill(later)

    pool.fill = held  # type: ignore[method-assign]
    _is_held.clear()
    _may_go.clear()


def let_go() -> None:
    _may_go.set()


def is_held() -> bool:
    return _is_held.is_set()


def share_memory(rank: int) -> None:
    """Wait until the other can be sent slabs."""
    agent = current_agent()
    member = agent._peers.registry.member(1 - rank)
    assert member is not None
    assert agent._carrier._endpoint.takes_files(member.incarnation)
    all_gather(None)


def double(n: int) -> int:
    return 2 * n


def make() -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32)


def is_right(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor, make())


# ---- answers ---------------------------------------------------------------------------------------------------------


def ask_who_stands_still(rank: int) -> None:
    share_memory(rank)
    if rank == 0:
        rpc.rpc_sync("worker1", hold_back)
        with pytest.raises(errors.RpcTimeoutError, match="PythonCall to WorkerInfo"):
            rpc.rpc_sync("worker1", make, timeout=1.0)
        late = rpc.rpc_async("worker1", make)
        until(lambda: rpc.rpc_sync("worker1", is_held), "it fills the answer")
        assert rpc.rpc_async("worker1", double, args=(3,)).wait() == 6
        rpc.rpc_sync("worker1", let_go)
        assert is_right(late.wait())
        assert is_right(rpc.rpc_sync("worker1", make))
    all_gather(None)


def test_an_answer_that_is_not_whole_keeps_its_caller_alone(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(ask_who_stands_still, 2)


def differentiate_where_one_stands_still(rank: int) -> None:
    share_memory(rank)
    if rank == 0:
        rpc.rpc_sync("worker1", double, args=(1,))
        weight = torch.ones(NUMEL, requires_grad=True)
        gradients: list[Any] = []

        def run() -> None:
            with autograd.context() as context_id:
                loss = rpc.rpc_sync("worker1", torch.mul, args=(weight, make())).sum()
                rpc.rpc_sync("worker1", hold_back)
                autograd.backward(context_id, [loss])
                gradients.append(autograd.get_gradients(context_id)[weight])

        passing = threading.Thread(target=run)
        passing.start()
        until(lambda: rpc.rpc_sync("worker1", is_held), "it fills the gradient")
        for n in range(100):
            assert rpc.rpc_sync("worker1", double, args=(n,)) == 2 * n, "somebody reads, whoever waits for the gradient"
        assert not gradients
        rpc.rpc_sync("worker1", let_go)
        passing.join()
        assert is_right(gradients[0])
    all_gather(None)


def test_a_gradient_that_is_not_whole_keeps_its_pass_alone(cluster: Cluster) -> None:
    cluster.run(differentiate_where_one_stands_still, 2)


# ---- requests --------------------------------------------------------------------------------------------------------


def call_and_stand_still(rank: int) -> None:
    share_memory(rank)
    if rank == 0:
        hold_back()
        results: list[bool] = []
        calling = threading.Thread(target=lambda: results.append(rpc.rpc_sync("worker1", is_right, args=(make(),))))
        calling.start()
        until(is_held, "it fills the request")
        for n in range(100):
            assert rpc.rpc_sync("worker1", double, args=(n,)) == 2 * n
        assert not results
        let_go()
        calling.join()
        assert results == [True]
    all_gather(None)


def test_a_request_that_is_not_whole_keeps_one_thread_of_its_callee(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(call_and_stand_still, 2)


def call_and_die(rank: int) -> int | None:
    share_memory(rank)
    agent = current_agent()
    if rank == 0:
        hold_back()
        for _ in range(3):
            threading.Thread(target=rpc.rpc_sync, args=("worker1", is_right), kwargs={"args": (make(),)}).start()
        until(lambda: rpc.rpc_sync("worker1", num_served) == 4, "three requests wait there to be whole")
        os.kill(os.getpid(), signal.SIGKILL)
    until(lambda: _most_served == 4, "three requests wait to be whole, when somebody asks for their number")
    until(lambda: agent.counts()["server_active_calls"] == 0, "nobody waits for the dead")
    with pytest.raises(errors.PeerLostError):
        rpc.rpc_sync("worker0", double, args=(1,))
    with pytest.raises(errors.PeerLostError):
        rpc.shutdown()
    return agent.counts()["server_active_calls"]


_most_served = 0


def num_served() -> int:
    global _most_served
    served = current_agent().counts()["server_active_calls"]
    _most_served = max(_most_served, served)
    return served


def started_and_call_and_die(rank: int, init_method: str) -> int | None:
    rpc.init_rpc(
        f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(init_method=init_method)
    )
    return call_and_die(rank)


def test_who_dies_before_its_request_is_whole_keeps_nobody(cluster_in_each_mode: Cluster) -> None:
    cluster = cluster_in_each_mode
    outcomes = cluster.start(started_and_call_and_die, 2, args=(cluster.new_init_method(),), init=False).wait(60)
    assert outcomes[1].error is None, outcomes[1].error
    assert outcomes[1].result == 0
    assert outcomes[0].error == "died without a word"
