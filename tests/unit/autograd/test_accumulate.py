"""When gradients are copied, and when not; torch's own suite asks for the same."""

from __future__ import annotations

import pytest
import torch

from zrpc.autograd.accumulate import Sum, Taken, add_all

Sums = dict[torch.Tensor, Sum]


def leaf(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, requires_grad=True)


def sparse(rows: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (rows, 3), check_invariants=True)


def test_a_gradient_that_nobody_else_holds_is_kept() -> None:
    x, sums = leaf(3), Sums()
    taken: list[Taken] = [(x, torch.ones(3))]
    where = taken[0][1].data_ptr()
    add_all(sums, taken)
    assert sums[x].value.data_ptr() == where
    assert not sums[x].is_ours


def test_a_gradient_that_is_held_elsewhere_is_copied() -> None:
    x, sums, held = leaf(3), Sums(), torch.ones(3)
    add_all(sums, [(x, held)])
    assert sums[x].value.data_ptr() != held.data_ptr()


def test_a_gradient_that_a_graph_holds_is_copied() -> None:
    x, sums = leaf(3), Sums()
    weight = leaf(3)
    taken: list[Taken] = [(x, torch.ones(3))]
    product = taken[0][1] * weight  # saves it, in C++
    where = taken[0][1].data_ptr()
    add_all(sums, taken)
    assert sums[x].value.data_ptr() != where
    del product


def test_one_gradient_for_two_leaves_is_copied_for_both() -> None:
    x, y, sums = leaf(3), leaf(3), Sums()
    gradient = torch.ones(3)
    where = gradient.data_ptr()
    taken: list[Taken] = [(x, gradient), (y, gradient)]
    del gradient
    add_all(sums, taken)
    assert len({sums[x].value.data_ptr(), sums[y].value.data_ptr(), where}) == 3


@pytest.mark.parametrize("gradient", [torch.ones(1, 1).expand(2, 3), torch.ones(3, 2).t()], ids=["expanded", "turned"])
def test_a_gradient_that_lies_otherwise_than_its_leaf_is_copied(gradient: torch.Tensor) -> None:
    x, sums = leaf(2, 3), Sums()
    add_all(sums, [(x, gradient.view_as(gradient))])
    assert sums[x].value.stride() == x.stride()
    assert torch.equal(sums[x].value, torch.ones(2, 3))


def test_the_strides_of_a_dense_leaf_are_kept() -> None:
    x, sums = torch.zeros(2, 3).t().detach().requires_grad_(), Sums()
    add_all(sums, [(x, torch.ones(3, 2))])
    assert sums[x].value.stride() == x.stride()


def test_memory_of_others_is_not_written_to() -> None:
    x, sums = leaf(3), Sums()
    add_all(sums, [(x, torch.ones(3))])
    stolen = sums[x].value
    add_all(sums, [(x, torch.ones(3))])
    assert torch.equal(stolen, torch.ones(3))
    assert torch.equal(sums[x].value, torch.full((3,), 2.0))


def test_later_gradients_are_added_in_place() -> None:
    x, sums = leaf(3), Sums()
    for _ in range(2):
        add_all(sums, [(x, torch.ones(3))])
    where = sums[x].value.data_ptr()
    add_all(sums, [(x, torch.ones(3))])
    assert sums[x].value.data_ptr() == where
    assert torch.equal(sums[x].value, torch.full((3,), 3.0))


def test_a_sum_that_somebody_looks_at_does_not_change_under_him() -> None:
    x, sums = leaf(3), Sums()
    for _ in range(2):
        add_all(sums, [(x, torch.ones(3))])
    seen = sums[x].value
    add_all(sums, [(x, torch.ones(3))])
    assert torch.equal(seen, torch.full((3,), 2.0))


def test_a_sparse_gradient_is_kept() -> None:
    x, sums = leaf(4, 3), Sums()
    taken: list[Taken] = [(x, sparse(4))]
    where = taken[0][1]._values().data_ptr()
    add_all(sums, taken)
    assert sums[x].value._values().data_ptr() == where


def test_sparse_and_dense_gradients_add_up_in_either_order() -> None:
    expected = torch.ones(4, 3) + sparse(4).to_dense()
    for first, second in [(sparse(4), torch.ones(4, 3)), (torch.ones(4, 3), sparse(4))]:
        x, sums = leaf(4, 3), Sums()
        add_all(sums, [(x, first), (x, second)])
        assert torch.equal(sums[x].value, expected)


def test_sparse_gradients_add_up() -> None:
    x, sums = leaf(4, 3), Sums()
    add_all(sums, [(x, sparse(4)), (x, sparse(4))])
    assert torch.equal(sums[x].value.to_dense(), 2 * sparse(4).to_dense())
