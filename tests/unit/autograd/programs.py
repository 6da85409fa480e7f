"""Random differentiable programs, and what to expect of their gradients.

All values are small whole numbers in float64, so sums are exact in whatever order they are made, and gradients can be
compared with `torch.equal`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch.autograd import Function

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypothesis.strategies import DrawFn

SIZE = 4
MODULUS = 5


class Twice(Function):
    """A Python function with two inputs, two outputs and one gradient that does not exist."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (a * 2 + b).remainder(MODULUS), a - b

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        first, second = gradients
        return first * 2 + second, None


class Given(Function):
    """Stands for a send function in one process: a node whose backward gives gradients that are known beforehand."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[torch.Tensor | None], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.gradients)


def bend(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor hook that gives something else for parts of a gradient than for the whole. None stays None."""
    return None if gradient is None else gradient.remainder(7) + 1


def bend_all(gradients: Sequence[torch.Tensor | None], _: object = None) -> tuple[torch.Tensor | None, ...]:
    """The same as a hook of a node."""
    return tuple(bend(gradient) for gradient in gradients)


def split(a: torch.Tensor) -> list[torch.Tensor]:
    """One node, two outputs."""
    first, second = torch.split(torch.cat([a, a * 2]), SIZE)
    return [first.remainder(MODULUS), second.remainder(MODULUS)]


OPERATIONS: dict[str, Callable[..., list[torch.Tensor]]] = {
    "add": lambda a, b: [a + b],
    "multiply": lambda a, b: [(a * b).remainder(MODULUS)],
    "broadcast": lambda a, b: [(a.sum().remainder(MODULUS) * b).remainder(MODULUS)],
    "split": lambda a, b: split(a - b),
    "python": lambda a, b: list(Twice.apply(a, b)),  # type: ignore[no-untyped-call]
    "view": lambda a: [a.view(2, 2).t().reshape(SIZE)],
}
UNARY = {"view"}
HOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda tensor: tensor.register_hook(bend),  # type: ignore[no-untyped-call]
    "retain": lambda tensor: tensor.retain_grad(),
    "post": lambda tensor: tensor.grad_fn and tensor.grad_fn.register_hook(bend_all),
    "pre": lambda tensor: tensor.grad_fn and tensor.grad_fn.register_prehook(bend_all),
}


@dataclass(frozen=True)
class Step:
    """Apply an operation to two earlier tensors, maybe hook the first output, and maybe do something else with it."""

    operation: str
    first: int
    second: int
    hook: str | None

    def operands(self, n: int) -> list[int]:
        """The numbers of its operands, with `n` tensors there so far."""
        return [self.first % n] if self.operation in UNARY else [self.first % n, self.second % n]

    def compute(self, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What it makes of them."""
        outputs = OPERATIONS[self.operation](*operands)
        if self.hook is not None and outputs[0].requires_grad:
            HOOKS[self.hook](outputs[0])
        return outputs


@dataclass(frozen=True)
class Program:
    """A program: `n_leaves` leaves, some of them hooked, and steps."""

    n_leaves: int
    hooked_leaves: frozenset[int]
    steps: tuple[Step, ...]


@dataclass
class Trace:
    """A program that was run: its leaves and all its tensors, leaves first."""

    leaves: list[torch.Tensor]
    tensors: list[torch.Tensor] = field(default_factory=list)

    def run(self, step: Step) -> None:
        """Run one step."""
        self.tensors += step.compute([self.tensors[number] for number in step.operands(len(self.tensors))])


def leaf(index: int) -> torch.Tensor:
    """Leaf number `index`."""
    return (torch.arange(SIZE, dtype=torch.float64) + index).remainder(MODULUS).requires_grad_()


def steps(max_tensors: int = 30) -> st.SearchStrategy[Step]:
    """Random steps."""
    index = st.integers(0, max_tensors)
    hook = st.sampled_from([None, None, None, *HOOKS])
    return st.builds(Step, st.sampled_from(sorted(OPERATIONS)), index, index, hook)


@st.composite
def programs(draw: DrawFn, max_steps: int = 10) -> Program:
    """Random programs."""
    n_leaves = draw(st.integers(1, 3))
    hooked = draw(st.frozensets(st.integers(0, n_leaves - 1)))
    return Program(n_leaves, hooked, tuple(draw(st.lists(steps(), min_size=1, max_size=max_steps))))


def begin(program: Program) -> Trace:
    """The leaves of `program`, hooked."""
    leaves = [leaf(index) for index in range(program.n_leaves)]
    for index in program.hooked_leaves:
        leaves[index].register_hook(bend)  # type: ignore[no-untyped-call]
    return Trace(leaves, list(leaves))


def same(mine: torch.Tensor | None, its: torch.Tensor | None) -> bool:
    """Whether two gradients are equal to the bit, or both missing."""
    if mine is None or its is None:
        return mine is its
    return torch.equal(mine, its)
