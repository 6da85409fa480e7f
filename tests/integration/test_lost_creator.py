"""A worker takes the maker of an autograd context for lost, and others do not: no gradient goes missing unsaid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from tests.kept import kept
from tests.waiting import until
from zrpc import autograd as dist_autograd
from zrpc.agent.current import current_agent
from zrpc.autograd.service import AutogradService
from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster


def lose_creator() -> None:
    """What follows here from the loss of worker 0, for autograd."""
    service: AutogradService = current_agent().extensions[AutogradService]
    service.on_peer_lost(rpc.get_worker_info("worker0"), "on purpose")


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def double_and_lose(x: torch.Tensor) -> torch.Tensor:
    lose_creator()
    return 2 * x


def call_and_lose(x: torch.Tensor) -> torch.Tensor:
    y = rpc.rpc_sync("worker2", double, args=(x,))
    lose_creator()
    return y


def lose_and_call(x: torch.Tensor) -> torch.Tensor:
    lose_creator()
    return rpc.rpc_sync("worker2", double, args=(x,))


def call_while_lost(x: torch.Tensor) -> torch.Tensor:
    future = rpc.rpc_async("worker2", double, args=(x,))
    lose_creator()
    return future.wait()


def call_one_that_loses(x: torch.Tensor) -> torch.Tensor:
    return rpc.rpc_sync("worker2", double_and_lose, args=(x,))


def known_before(x: torch.Tensor) -> torch.Tensor:
    rpc.rpc_sync("worker1", double, args=(x,))
    rpc.rpc_sync("worker1", lose_creator)
    return rpc.rpc_sync("worker1", double, args=(x,))


def by_a_reference(x: torch.Tensor) -> torch.Tensor:
    return rpc.remote("worker1", double_and_lose, args=(x,)).to_here()


def beside_another(x: torch.Tensor) -> torch.Tensor:
    """Half of the gradient would come."""
    return rpc.rpc_sync("worker1", double, args=(x,)) + rpc.rpc_sync("worker2", double_and_lose, args=(x,))


def directly(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: rpc.rpc_sync("worker1", function, args=(x,))


CASES = {
    "the callee": directly(double_and_lose),
    "one in the middle, after its call": directly(call_and_lose),
    "one in the middle, before its call": directly(lose_and_call),
    "one in the middle, during its call": directly(call_while_lost),
    "the last of three": directly(call_one_that_loses),
    "a callee that knew the context": known_before,
    "the owner of a value": by_a_reference,
    "one of two callees": beside_another,
}


def gradients_of(name: str, mode: str) -> dict[torch.Tensor, torch.Tensor]:
    x = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context_id:
        y = CASES[name](x)
        dist_autograd.backward(context_id, [y.sum()], mode=mode)
        return dist_autograd.get_gradients(context_id)


def run_case(rank: int, name: str, mode: str) -> None:
    if rank == 0:
        with pytest.raises(AutogradError, match="gradients would be missing"):
            gradients_of(name, mode)
    until(lambda: not {"num_autograd_contexts", "num_current_backward_passes"} & kept().keys(), "none is kept", kept)


@pytest.mark.parametrize("mode", ["fast", "smart"])
@pytest.mark.parametrize("name", CASES)
def test_a_pass_fails_where_the_creator_is_lost_for(name: str, mode: str, cluster: Cluster) -> None:
    """It ended as if all gradients were there."""
    cluster.run(run_case, 3, args=(name, mode))
