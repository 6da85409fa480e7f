"""The local part of a pass: several sources at different times give what one call of torch's engine gives."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.autograd.programs import SIZE, Given, Program, Trace, begin, programs, same
from zrpc.autograd.accumulate import Sum, Taken, add_all
from zrpc.autograd.functions import Gradients, RecvInfo, SendFunction, record_recv
from zrpc.autograd.leaves import _taps
from zrpc.autograd.local import LocalPass
from zrpc.errors import AutogradError
from zrpc.ids import GlobalId

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn


@dataclass(frozen=True)
class Traffic:
    """What else happens in a program: after which steps tensors come, and which tensors leave in which messages."""

    received_after: tuple[int, ...]
    sent: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    roots: tuple[int, ...]
    passes: int


@st.composite
def traffics(draw: DrawFn) -> Traffic:
    """Random traffic."""
    index = st.integers(0, 40)
    sent = draw(st.lists(st.lists(index, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple))
    return Traffic(
        draw(st.lists(st.integers(0, 10), max_size=3).map(tuple)),
        sent,
        tuple(draw(st.permutations(range(len(sent) + 1)))),
        draw(st.lists(index, min_size=1, max_size=2).map(tuple)),
        draw(st.integers(1, 2)),
    )


def trace_of(program: Program, traffic: Traffic, receive: bool) -> tuple[Trace, list[torch.Tensor]]:
    """Run `program`; the tensors that come are leaves, or outputs of receive functions."""
    trace, received = begin(program), []
    for number, step in enumerate(program.steps):
        if number in traffic.received_after:
            tensor = torch.arange(SIZE, dtype=torch.float64).remainder(3).requires_grad_()
            if receive:
                (tensor,) = record_recv(RecvInfo(1, GlobalId(1, number)), [tensor])[1]
            received.append(tensor)
            trace.tensors.append(tensor)
        trace.run(step)
    return trace, received


def gradient_for(message: int, index: int) -> torch.Tensor | None:
    """What comes for tensor `index` of a message; nothing for some of them."""
    return None if (message + index) % 4 == 3 else torch.full((SIZE,), float(message + index + 1), dtype=torch.float64)


def roots_of(trace: Trace, traffic: Traffic) -> list[torch.Tensor]:
    """The roots: sums of some tensors, which some of them may lead to as well."""
    picked = [trace.tensors[index % len(trace.tensors)] for index in traffic.roots]
    first = picked[0].sum() * 2
    return [first, *(tensor.sum() + first for tensor in picked[1:])]


def picked(trace: Trace, message: tuple[int, ...]) -> list[torch.Tensor]:
    """The tensors of a message."""
    found = [trace.tensors[index % len(trace.tensors)] for index in message]
    return [tensor for tensor in found if tensor.requires_grad]


@settings(max_examples=300, deadline=None)
@given(program=programs(), traffic=traffics())
def test_whatever_comes_when_the_gradients_are_those_of_one_call(program: Program, traffic: Traffic) -> None:
    reference, its_received = trace_of(program, traffic, receive=False)
    outputs = list(roots_of(reference, traffic))
    for number, message in enumerate(traffic.sent):
        if tensors := picked(reference, message):
            gradients = [gradient_for(number, index) for index in range(len(tensors))]
            outputs.append(Given.apply(gradients, *tensors))  # type: ignore[no-untyped-call]
    expected = torch.autograd.grad(outputs, reference.leaves + its_received, allow_unused=True)

    trace, received = trace_of(program, traffic, receive=True)
    sends = {
        GlobalId(0, number): SendFunction(tensors, to=1)
        for number, message in enumerate(traffic.sent)
        if (tensors := picked(trace, message))
    }
    delivered: dict[int, Gradients] = {}
    for _ in range(traffic.passes):
        delivered.clear()
        sums: dict[torch.Tensor, Sum] = {}
        run_pass(roots_of(trace, traffic), sends, traffic, delivered, sums)

    mine = [None if tensor not in sums else sums[tensor].value for tensor in trace.leaves]
    for tensor in received:
        assert tensor.grad_fn is not None
        gradient = delivered.get(tensor.grad_fn.info.message_id.local_id, [None])[0]  # type: ignore[attr-defined]
        mine.append(gradient)
    assert all(same(one, other) for one, other in zip(mine, expected, strict=True)), (mine, expected)
    assert all(tensor.grad is None for tensor in trace.leaves)
    assert not _taps


def run_pass(
    roots: list[torch.Tensor],
    sends: dict[GlobalId, SendFunction],
    traffic: Traffic,
    delivered: dict[int, Gradients],
    sums: dict[torch.Tensor, Sum],
) -> None:
    """One pass, with the sources in the order of `traffic`."""

    def on_received(info: RecvInfo, gradients: Gradients) -> None:
        assert info.message_id.local_id not in delivered, "a receive function ran twice"
        delivered[info.message_id.local_id] = gradients

    def on_leaves(taken: list[Taken]) -> None:
        add_all(sums, taken)

    local = LocalPass(roots, sends, True, on_received, on_leaves)
    for source in traffic.order:
        message_id = GlobalId(0, source)
        if source == len(traffic.sent):
            local.run_roots()
        elif message_id in sends:
            n_tensors = len(sends[message_id].next_functions)
            local.run_send(message_id, [gradient_for(source, index) for index in range(n_tensors)])
    assert local.finished
    local.close()


def scalar_pass(root: torch.Tensor, sums: dict[torch.Tensor, Sum]) -> LocalPass:
    return LocalPass([root], {}, False, lambda info, gradients: None, lambda taken: add_all(sums, taken))


def test_local_backward_of_others_goes_by_the_taps() -> None:
    leaf = torch.ones(3, requires_grad=True)
    root = (leaf * 2).sum()
    sums: dict[torch.Tensor, Sum] = {}
    local = scalar_pass(root, sums)
    torch.autograd.backward(root, retain_graph=True)
    local.run_roots()
    local.close()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, sums[leaf].value)


def test_hooks_of_the_leafs_node_run() -> None:
    leaf = torch.ones(3, requires_grad=True)
    doubled = leaf * 2
    assert doubled.grad_fn is not None
    calls = []
    doubled.grad_fn.next_functions[0][0].register_hook(lambda *_: calls.append("post"))  # type: ignore[union-attr]
    doubled.grad_fn.next_functions[0][0].register_prehook(lambda *_: calls.append("pre"))  # type: ignore[union-attr]
    local = scalar_pass(doubled.sum(), {})
    local.run_roots()
    local.close()
    assert calls == ["pre", "post"]


def test_a_graph_that_is_not_retained_cannot_be_used_twice() -> None:
    leaf = torch.ones(3, requires_grad=True)
    root = (leaf * leaf).sum()
    sums: dict[torch.Tensor, Sum] = {}
    first, second = scalar_pass(root, sums), scalar_pass(root, sums)
    first.run_roots()
    with pytest.raises(RuntimeError, match="second time"):
        second.run_roots()
    first.close()
    second.close()


def test_local_autograd_says_what_to_call_instead() -> None:
    _, (tensor,) = record_recv(RecvInfo(3, GlobalId(3, 0)), [torch.ones(2, requires_grad=True)])
    with pytest.raises(AutogradError, match=r"rank 3: use zrpc\.autograd\.backward"):
        torch.autograd.backward(tensor.sum())


def test_received_tensors_may_be_changed_in_place() -> None:
    _, (tensor,) = record_recv(RecvInfo(1, GlobalId(1, 0)), [torch.ones(2, requires_grad=True)])
    tensor.mul_(2)
    assert not tensor._is_view()


def test_as_many_gradients_as_tensors_must_come() -> None:
    leaf = torch.ones(2, requires_grad=True)
    sends = {GlobalId(0, 0): SendFunction([leaf, leaf * 2], to=1)}
    local = LocalPass([], sends, False, lambda info, gradients: None, lambda taken: None)
    with pytest.raises(AutogradError, match="1 gradients came for 2 tensors"):
        local.run_send(GlobalId(0, 0), [torch.ones(2)])
    local.close()


def test_a_sent_tensor_is_not_kept_and_its_graph_is() -> None:
    leaf = torch.ones(2, requires_grad=True)
    _, (received,) = record_recv(RecvInfo(3, GlobalId(3, 0)), [torch.ones(2, requires_grad=True)])
    doubled = leaf * 2
    alive = [weakref.ref(doubled), weakref.ref(received)]
    sends = {GlobalId(0, 0): SendFunction([doubled, received, leaf], to=1)}
    sends[GlobalId(0, 0)].locate()
    del doubled, received
    assert [one() for one in alive] == [None, None]
    delivered: list[Gradients] = []
    sums: dict[torch.Tensor, Sum] = {}
    local = LocalPass(
        [], sends, False, lambda info, gradients: delivered.append(gradients), lambda taken: add_all(sums, taken)
    )
    local.run_send(GlobalId(0, 0), [torch.full((2,), 3.0), torch.full((2,), 5.0), torch.full((2,), 7.0)])
    local.close()
    assert sums[leaf].value.tolist() == [13.0, 13.0]
    assert [None if gradient is None else gradient.tolist() for gradient in delivered[0]] == [[5.0, 5.0]]


def test_sparse_tensors_have_edges_too() -> None:
    leaf = torch.eye(2).to_sparse().requires_grad_()
    sends = {GlobalId(0, 0): SendFunction([leaf], to=1)}
    sums: dict[torch.Tensor, Sum] = {}
    local = LocalPass([], sends, False, lambda info, gradients: None, lambda taken: add_all(sums, taken))
    local.run_send(GlobalId(0, 0), [torch.eye(2).to_sparse()])
    local.close()
    assert sums[leaf].value.to_dense().tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_send_functions_look_like_torchs() -> None:
    send = SendFunction([torch.ones(2, requires_grad=True)], to=1)
    assert send.name() == "torch::distributed::autograd::SendRpcBackward"
    assert [(node.name(), slot) for node, slot in send.next_functions] == [("torch::autograd::AccumulateGrad", 0)]
