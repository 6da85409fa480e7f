"""The optimizer of one worker takes gradients from the context, and only those."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from zrpc.optim import DistributedOptimizer, distributed_optimizer
from zrpc.optim.distributed_optimizer import LocalOptimizer, all_of

if TYPE_CHECKING:
    from collections.abc import Callable

Contexts = dict[int, dict[torch.Tensor, torch.Tensor]]


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> Contexts:
    """Gradients by context id, as this worker would have them."""
    made: Contexts = {}
    get: Callable[[int], dict[torch.Tensor, torch.Tensor]] = made.__getitem__
    monkeypatch.setattr(distributed_optimizer, "get_gradients", get)
    return made


def parameter(value: float) -> torch.Tensor:
    return torch.full((2,), value, requires_grad=True)


def sgd(*parameters: torch.Tensor, lr: float = 1.0) -> LocalOptimizer:
    return LocalOptimizer(torch.optim.SGD, list(parameters), (), {"lr": lr})


def test_a_step_uses_the_gradients_of_the_context(contexts: Contexts) -> None:
    weight = parameter(1.0)
    own = weight.grad = torch.full((2,), 100.0)
    contexts[7] = {weight: torch.ones(2)}
    sgd(weight, lr=0.5).step(7)
    assert torch.equal(weight, torch.full((2,), 0.5))
    assert weight.grad is own


def test_a_parameter_without_gradient_is_left_alone(contexts: Contexts) -> None:
    used, unused = parameter(1.0), parameter(2.0)
    contexts[1] = {used: torch.ones(2), unused: torch.ones(2)}
    contexts[2] = {used: torch.ones(2)}
    optimizer = sgd(used, unused)
    optimizer.step(1)
    optimizer.step(2)
    assert torch.equal(used, torch.full((2,), -1.0))
    assert torch.equal(unused, torch.ones(2))


def test_gradients_of_strangers_are_not_touched(contexts: Contexts) -> None:
    mine, other = parameter(1.0), parameter(1.0)
    contexts[1] = {mine: torch.ones(2), other: torch.ones(2)}
    sgd(mine).step(1)
    assert other.grad is None


def test_steps_follow_one_another(contexts: Contexts) -> None:
    weight = parameter(0.0)
    contexts[1] = {weight: torch.ones(2)}

    def train(optimizer: LocalOptimizer) -> None:
        for _ in range(50):
            optimizer.step(1)

    threads = [threading.Thread(target=train, args=(sgd(weight),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(weight, torch.full((2,), -200.0))


def test_the_gradients_of_a_parameter_come_back_after_an_error(contexts: Contexts) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]  # it is called with none
            raise ValueError("on purpose")

    weight = parameter(1.0)
    own = weight.grad = torch.full((2,), 100.0)
    contexts[1] = {weight: torch.ones(2)}
    with pytest.raises(ValueError, match="on purpose"):
        LocalOptimizer(Failing, [weight], (1.0,), {}).step(1)
    assert weight.grad is own


def test_all_are_waited_for_before_an_error_is_raised() -> None:
    failed: torch.futures.Future[int] = torch.futures.Future()
    done: torch.futures.Future[int] = torch.futures.Future()
    failed.set_exception(ValueError("first"))  # type: ignore[arg-type]  # torch's own annotation is wrong
    done.set_result(1)
    with pytest.raises(ValueError, match="first"):
        all_of([failed, done])


def test_the_name_is_exported() -> None:
    assert DistributedOptimizer.__name__ == "DistributedOptimizer"
