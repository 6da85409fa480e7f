"""Gradients of parameters and other leaves that are no plain tensors, through calls between real workers."""

from __future__ import annotations

import collections
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import zrpc as rpc
from zrpc import autograd

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

X = torch.tensor([1.0, 2.0, 3.0])


class Tagged(torch.Tensor):
    """A subclass."""


class Weight(nn.Parameter):
    """A subclass of a parameter."""


class Pair(NamedTuple):
    """A tuple with names."""

    one: Any
    other: Any


LEAVES: dict[str, Callable[[], torch.Tensor]] = {
    "parameter": lambda: nn.Parameter(torch.full((3,), 2.0)),
    "subclass of parameter": lambda: Weight(torch.full((3,), 2.0)),
    "buffer": lambda: nn.Buffer(torch.full((3,), 2.0).requires_grad_()),
    "subclass": lambda: torch.full((3,), 2.0).as_subclass(Tagged).requires_grad_(),
}


def times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(times)

CALLS: dict[str, Callable[[str, torch.Tensor], Any]] = {
    "rpc_sync": lambda to, p: rpc.rpc_sync(to, torch.mul, args=(p, X)),
    "rpc_async, by keyword": lambda to, p: rpc.rpc_async(to, torch.mul, args=(X,), kwargs={"other": p}).wait(),
    "remote": lambda to, p: rpc.remote(to, torch.mul, args=(p, X)).to_here(),
    "in a list": lambda to, p: rpc.rpc_sync(to, torch.stack, args=([p, X],))[0] * X,
    "in a tuple": lambda to, p: rpc.rpc_sync(to, torch.stack, args=((p, X),))[0] * X,
    "twice": lambda to, p: rpc.rpc_sync(to, torch.mul, args=(p, p)) * X / 4,
    "of an overload": lambda to, p: rpc.rpc_sync(to, torch.ops.aten.mul.Tensor, args=(p, X)),
    "beside what only pickle carries": lambda to, p: rpc.rpc_sync(to, torch.mul, args=(p, np.float32(2))) * X / 2,
    "of compiled code": lambda to, p: rpc.rpc_sync(to, scripted, args=(p, X)),
    "of compiled code, by keyword": lambda to, p: rpc.remote(to, scripted, args=(X,), kwargs={"y": p}).to_here(),
}


def operators_reach(rank: int, leaf: str) -> None:
    if rank:
        return
    for name, call in CALLS.items():
        parameter = LEAVES[leaf]()
        with autograd.context() as context_id:
            autograd.backward(context_id, [call("worker1", parameter).sum()])
            gradient = autograd.get_gradients(context_id).get(parameter)
        assert gradient is not None, name
        assert gradient.tolist() == [1, 2, 3], name


@pytest.mark.parametrize("leaf", LEAVES)
def test_gradients_reach_what_a_torch_operator_was_given(cluster: Cluster, leaf: str) -> None:
    """Whatever kind of tensor it is, and wherever in the arguments."""
    cluster.run(operators_reach, 2, args=(leaf,))


def of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value * X).sum()
    items = value.values() if isinstance(value, dict) else value
    return sum(of(item) for item in items if isinstance(item, torch.Tensor | list | tuple | dict))


def of_reference(reference: rpc.RRef[Any]) -> Any:
    return of(reference.to_here())


VALUES: dict[str, Callable[[torch.Tensor], Any]] = {
    "alone": lambda p: p,
    "list": lambda p: [p, p.detach()],
    "tuple": lambda p: (p, X),
    "named tuple": lambda p: Pair(p, 3),
    "dict": lambda p: {"a": p, 1: None},
    "ordered dict": lambda p: collections.OrderedDict(a=p),
    "nested": lambda p: {"a": [(p,), "name"]},
}


def references_reach(rank: int, leaf: str) -> None:
    if rank:
        return
    for name, value_of in VALUES.items():
        parameter = LEAVES[leaf]()
        with autograd.context() as context_id:
            result = rpc.rpc_sync("worker1", of_reference, args=(rpc.RRef(value_of(parameter)),))
            autograd.backward(context_id, [result])
            gradient = autograd.get_gradients(context_id).get(parameter)
        assert gradient is not None, name
        assert gradient.tolist() == [1, 2, 3], name


@pytest.mark.parametrize("leaf", LEAVES)
def test_gradients_reach_what_is_behind_a_reference(cluster: Cluster, leaf: str) -> None:
    """`RRef(value)` of tensors, and of lists, tuples and dicts of those and plain values, is fetched with its graph."""
    cluster.run(references_reach, 2, args=(leaf,))


def proxied(reference: rpc.RRef[Any]) -> torch.Tensor:
    at_once: torch.Tensor = reference.rpc_sync().mul(X)
    later: torch.Tensor = reference.remote().mul(X).to_here()
    return at_once + later


def proxies_reach(rank: int) -> None:
    if rank:
        return
    parameter = LEAVES["parameter"]()
    with autograd.context() as context_id:
        result = rpc.rpc_sync("worker1", proxied, args=(rpc.RRef(parameter),))
        autograd.backward(context_id, [result.sum()])
        assert autograd.get_gradients(context_id)[parameter].tolist() == [2, 4, 6]
    scalar = nn.Parameter(torch.tensor(2.0))
    with autograd.context() as context_id:
        product = rpc.rpc_sync("worker1", torch.mul, args=(scalar, scalar))
        rpc.RRef(product).backward(context_id)
        assert autograd.get_gradients(context_id)[scalar] == 4


def test_gradients_reach_a_parameter_through_proxies(cluster: Cluster) -> None:
    """Methods that others call on it run on its owner."""
    cluster.run(proxies_reach, 2)


def classes(*values: Any) -> list[str]:
    return [type(value).__name__ for value in values]


def class_behind(reference: rpc.RRef[Any]) -> str:
    return type(reference.to_here()).__name__


def classes_are_torchs(rank: int) -> None:
    if rank:
        return
    parameter, tagged = LEAVES["parameter"](), torch.ones(3).as_subclass(Tagged)
    assert rpc.rpc_sync("worker1", classes, args=(parameter, tagged)) == ["Parameter", "Tagged"]
    seen = [rpc.rpc_sync("worker1", class_behind, args=(rpc.RRef(value),)) for value in (parameter, tagged)]
    assert seen == ["Tensor", "Tagged"]
    assert type(rpc.rpc_sync("worker1", torch.mul, args=(tagged, 2))) is torch.Tensor


def test_a_function_sees_the_class_and_an_operator_a_tensor(cluster: Cluster) -> None:
    """Behind a reference a parameter is a plain tensor, as on torch."""
    cluster.run(classes_are_torchs, 2)


def cut_off_is_told(rank: int) -> list[str]:
    if rank:
        return []
    model, parameter = nn.Linear(3, 3), LEAVES["parameter"]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rpc.rpc_sync("worker1", classes, args=(model,))
        with autograd.context():
            rpc.rpc_sync("worker1", torch.mul, args=(parameter, X))
            rpc.rpc_sync("worker1", classes, args=(parameter * 1, parameter.detach()))
            with torch.no_grad():
                rpc.rpc_sync("worker1", classes, args=(model,))
            assert not caught, "nothing was cut off"
            for _ in range(2):
                rpc.rpc_sync("worker1", classes, args=([model],))
                rpc.rpc_sync("worker1", classes, args=(parameter,))
    return [str(warning.message) for warning in caught]


def test_what_is_cut_off_in_a_context_is_told_once(cluster: Cluster) -> None:
    """A parameter or module handed to a Python function gets no gradient, as on torch; a warning says what to do."""
    warned = cluster.run(cut_off_is_told, 2)[0]
    assert len(warned) == 1
    assert "no gradient comes back" in warned[0]
    assert "RRef(parameter)" in warned[0]
