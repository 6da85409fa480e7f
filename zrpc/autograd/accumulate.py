"""Adding up the gradients of a leaf: when they are copied, and when not.

The rules are those of torch's `AccumulateGrad`: a first gradient is kept as it is if nobody else holds it and it lies
in memory as its leaf does, else copied. Later ones are added, in place where the sum is ours alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Taken = tuple[torch.Tensor, torch.Tensor]
"""A leaf and a gradient of it."""


@dataclass(slots=True)
class Sum:
    """The gradient of a leaf so far.

    Attributes:
        value: the gradient.
        is_ours: whether its memory was made here; else it may be shared with somebody, and is not written to.
    """

    value: torch.Tensor
    is_ours: bool


def add_all(sums: dict[torch.Tensor, Sum], taken: Sequence[Taken]) -> None:
    """Add the gradients `taken` to `sums`. What `taken` holds twice, or is held elsewhere, is copied."""
    held_by_taken = _references_alone()
    for index in range(len(taken)):
        alone = _references(taken, index) == held_by_taken
        leaf, gradient = taken[index]
        old = sums.get(leaf)
        if old is None and alone and _is_as_plain(gradient, leaf):
            sums[leaf] = Sum(gradient, is_ours=False)
        else:
            with torch.no_grad():
                sums[leaf] = _first(leaf, gradient, alone) if old is None else _add(old, gradient)
        del gradient  # it would be counted, should it come again


def _is_as_plain(gradient: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether both are contiguous, the usual case, which needs no closer look."""
    return (
        gradient.layout is torch.strided
        and leaf.layout is torch.strided
        and not gradient.requires_grad
        and gradient.shape == leaf.shape
        and gradient.is_contiguous()
        and leaf.is_contiguous()
    )


def _references(taken: Sequence[Taken], index: int) -> tuple[int, int]:
    """How often gradient `index` is held, by Python and by C++. The caller must not hold it itself."""
    gradient: Any = taken[index][1]
    return sys.getrefcount(gradient), gradient._use_count()


def _first(leaf: torch.Tensor, gradient: torch.Tensor, alone: bool) -> Sum:
    gradient = gradient.detach() if gradient.requires_grad else gradient
    if gradient.layout is torch.strided:
        if alone and _lies_as(gradient, leaf):
            return Sum(gradient, is_ours=False)
        return Sum(_copy_as(gradient, leaf), is_ours=True)
    if gradient.layout is torch.sparse_coo and alone and _has_contiguous_parts(gradient):
        return Sum(gradient, is_ours=False)
    return Sum(gradient.clone(), is_ours=True)


def _add(old: Sum, gradient: torch.Tensor) -> Sum:
    if old.value.layout is not torch.strided:
        # torch adds sparse to dense tensors, not dense to sparse ones
        both = (old.value, gradient) if gradient.layout is not torch.strided else (gradient, old.value)
        return Sum(torch.add(*both), is_ours=True)
    if old.is_ours and sys.getrefcount(old.value) == _HELD_ONCE:
        old.value.add_(gradient)
        return old
    return Sum(torch.add(old.value, gradient), is_ours=True)


def _lies_as(gradient: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether `gradient` has the strides of `leaf`, or, where those are of no use, is contiguous."""
    if not _is_dense(leaf):
        return gradient.is_contiguous()
    return gradient.shape == leaf.shape and all(
        mine == its for size, mine, its in zip(leaf.shape, gradient.stride(), leaf.stride(), strict=True) if size != 1
    )


def _has_contiguous_parts(sparse: torch.Tensor) -> bool:
    return sparse._indices().is_contiguous() and sparse._values().is_contiguous()


def _copy_as(gradient: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    if not _is_dense(leaf) or gradient.shape != leaf.shape:
        return gradient.clone(memory_format=torch.contiguous_format)
    return gradient.new_empty_strided(leaf.shape, leaf.stride()).copy_(gradient)


def _is_dense(leaf: torch.Tensor) -> bool:
    """Whether the elements of `leaf` fill its memory without gaps or overlaps."""
    return leaf.layout is torch.strided and torch.ops.aten.is_non_overlapping_and_dense(leaf)


@cache
def _references_alone() -> tuple[int, int]:
    """What `_references` says of a gradient that only `taken` holds. Measured: it differs between versions of Python.

    Not while this module is imported: torch's first tensor takes 0.6 MB, which a worker at rest does without.
    """
    return _references([(torch.empty(1, device="cpu"), torch.empty(1, device="cpu"))], 0)


def _references_of_sum() -> int:
    value: Any = object()
    total = Sum(value, is_ours=True)
    del value
    return sys.getrefcount(total.value)


_HELD_ONCE = _references_of_sum()
"""What Python says of the gradient in a `Sum` that nothing else holds."""
