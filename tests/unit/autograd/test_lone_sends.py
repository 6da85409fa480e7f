"""Send functions of leaves that nothing else leads to: which they are, and what becomes of their gradients."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import pytest
import torch

from zrpc.autograd.accumulate import Sum, add_all
from zrpc.autograd.functions import SendFunction
from zrpc.autograd.graph import Graph, edges_of
from zrpc.autograd.leaves import _taps
from zrpc.autograd.local import LocalPass
from zrpc.autograd.lone_sends import LoneSends
from zrpc.errors import AutogradError
from zrpc.ids import GlobalId

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Sums = dict[torch.Tensor, Sum]


def leaf() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


def sends_of(*messages: Sequence[torch.Tensor]) -> dict[GlobalId, SendFunction]:
    return {GlobalId(0, number): SendFunction(tensors, to=number) for number, tensors in enumerate(messages)}


def lone_among(sends: dict[GlobalId, SendFunction], *roots: torch.Tensor) -> list[int]:
    """The numbers of those that are lone in a pass from `roots`."""
    graph = Graph()
    graph.add_source(edges_of(roots))
    lone = LoneSends(sends, even_operators=True)
    for message_id, send in sends.items():
        if message_id not in lone:
            graph.add_source(send.next_functions)
    lone.part_with(graph.numbers)
    return [message_id.local_id for message_id in sends if message_id in lone]


def test_lone_is_what_leads_to_leaves_of_its_own() -> None:
    a, b, c, d, e = leaf(), leaf(), leaf(), leaf(), leaf()
    sends = sends_of([a, b, a], [c * 2], [c], [d], [e], [e], [leaf(), d * 1])
    assert lone_among(sends) == [0]


def test_what_the_roots_lead_to_is_not_lone() -> None:
    a, b = leaf(), leaf()
    assert lone_among(sends_of([a], [b]), (a * 2).sum()) == [1]


def test_of_two_that_share_a_leaf_neither_is_lone_nor_is_a_third_that_shares_another_with_one() -> None:
    a, b, c = leaf(), leaf(), leaf()
    assert lone_among(sends_of([a, b], [a], [b, c], [leaf()])) == [3]


def pass_over(
    sends: dict[GlobalId, SendFunction], sums: Sums, left_alone: Callable[[torch.Tensor], bool] = lambda _: False
) -> LocalPass:
    return LocalPass([], sends, False, lambda info, gradients: None, lambda taken: add_all(sums, taken), left_alone)


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_their_gradients_are_taken_as_they_come(looks_ahead: bool) -> None:
    a, b = leaf(), leaf()
    sums: Sums = {}
    local = pass_over(sends_of([a, b, a], [leaf()]), sums)
    if looks_ahead:
        local.look_ahead()
    assert local.awaited() == {0, 1}
    local.run_send(GlobalId(0, 0), [torch.full((2,), 3.0), None, torch.full((2,), 4.0)])
    assert local.awaited() == {1}
    assert not local.finished
    local.run_send(GlobalId(0, 1), [None])
    assert local.finished
    local.close()
    assert {one: total.value.tolist() for one, total in sums.items()} == {a: [7.0, 7.0]}
    assert not _taps


def test_a_gradient_that_nobody_else_holds_is_not_copied() -> None:
    a = leaf()
    sums: Sums = {}
    local = pass_over(sends_of([a]), sums)
    came = [torch.full((2,), 3.0)]
    address = came[0].data_ptr()
    local.run_send(GlobalId(0, 0), [came.pop()])
    local.close()
    assert sums[a].value.data_ptr() == address


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_hooked_leaf_sees_its_whole_gradient_once(looks_ahead: bool) -> None:
    a = leaf()
    seen = []

    def double(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient.tolist())
        return gradient * 2

    a.register_hook(double)  # type: ignore[no-untyped-call]
    sums: Sums = {}
    local = pass_over(sends_of([a, a]), sums)
    if looks_ahead:
        local.look_ahead()
    local.run_send(GlobalId(0, 0), [torch.full((2,), 3.0), torch.full((2,), 4.0)])
    local.close()
    assert seen == [[7.0, 7.0]]
    assert sums[a].value.tolist() == [14.0, 14.0]
    assert a.grad is None


@pytest.mark.parametrize("count", [1, 2])
def test_hooks_of_a_leaf_run_once_without_a_gradient_too(count: int) -> None:
    a = leaf()
    seen: list[torch.Tensor | None] = []
    a.register_hook(seen.append)  # type: ignore[no-untyped-call]
    sums: Sums = {}
    sends = sends_of(*[[a]] * count)  # one is lone, two are not: both ways do the same
    local = pass_over(sends, sums)
    for message_id in sends:
        local.run_send(message_id, [None])
    local.close()
    assert not sums
    assert len(seen) == 1


def test_a_leaf_that_is_left_alone_gets_its_grad() -> None:
    a = leaf()
    sums: Sums = {}
    local = pass_over(sends_of([a]), sums, lambda one: one is a)
    local.look_ahead()
    local.run_send(GlobalId(0, 0), [torch.full((2,), 3.0)])
    local.close()
    assert not sums
    assert a.grad is not None
    assert a.grad.tolist() == [3.0, 3.0]


def test_a_gradient_of_another_shape_and_dtype_is_made_to_fit() -> None:
    a = leaf()
    sums: Sums = {}
    local = pass_over(sends_of([a]), sums)
    local.run_send(GlobalId(0, 0), [torch.ones(3, 2, dtype=torch.float64)])
    local.close()
    assert sums[a].value.tolist() == [3.0, 3.0]
    assert sums[a].value.dtype is torch.float32


def test_as_many_gradients_as_tensors_must_come_and_only_once() -> None:
    local = pass_over(sends_of([leaf()]), {})
    with pytest.raises(AutogradError, match="2 gradients came for 1 tensors"):
        local.run_send(GlobalId(0, 0), [None, None])
    with pytest.raises(AutogradError, match="has arrived before, or takes no part"):
        local.run_send(GlobalId(0, 0), [None])
    local.close()


def test_a_send_function_keeps_what_was_sent_until_it_is_located() -> None:
    doubled = leaf() * 2
    node, alive = doubled.grad_fn, weakref.ref(doubled)
    send = SendFunction([doubled], to=1)
    del doubled
    assert alive() is not None
    assert send.next_functions == ((node, 0),)
    assert alive() is None
