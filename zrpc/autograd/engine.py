"""One call of torch's engine: run a segment, and take the outputs of its cuts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge

from zrpc.autograd.cut import Cut, Gradients
from zrpc.autograd.functions import Run, executing

if TYPE_CHECKING:
    from collections.abc import Sequence

_run_backward: Any = torch.autograd.Variable._execution_engine.run_backward
"""What `torch.autograd.backward` ends in. Its checks of shapes and dtypes take as long as a small graph, and here the
gradients are those that the nodes themselves ask for."""


@dataclass(slots=True)
class Job:
    """A segment in terms of torch.

    Attributes:
        edges: where to begin. One that is there twice gets the sum.
        gradients: with what, one an edge.
        absent: nodes to begin with although there is no gradient for any of their inputs, each with one of its inputs.
        cuts: the nodes to end with, by number.
        ends: what else to run; not used where there are no cuts: then everything that follows is run.
        retain_graph: keep what the nodes saved.
    """

    retain_graph: bool
    edges: list[GradientEdge] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    absent: list[tuple[Any, int]] = field(default_factory=list)
    cuts: dict[int, Any] = field(default_factory=dict)
    ends: list[Any] = field(default_factory=list)

    def begin_at(self, node: Any, slot: int, gradient: torch.Tensor) -> None:
        """Begin at input `slot` of `node`, among others."""
        self.edges.append(GradientEdge(node, slot))
        self.gradients.append(gradient)

    def end_at(self, cuts: dict[int, Any], ends: list[Any]) -> None:
        """End at the nodes `cuts`, by number; `ends`: what else to run then."""
        self.cuts = cuts
        if cuts:
            self.ends = ends

    def begin_with(self, node: Any, handed: Sequence[tuple[int, torch.Tensor | None]], *, even_absent: bool) -> None:
        """Begin at `node`, some of whose inputs have gradients. `even_absent`: it is to run even if none has."""
        defined = [(slot, gradient) for slot, gradient in handed if gradient is not None]
        for slot, gradient in defined:
            self.begin_at(node, slot, gradient)
        if even_absent and not defined:
            self.absent.append((node, handed[0][0]))


def execute(job: Job, run: Run) -> dict[int, Gradients]:
    """Run `job`; what nodes and hooks give or ask for goes to `run`.

    Returns:
        The outputs of each cut, by its number.

    Raises:
        Exception: whatever a node or a hook raises.
    """
    if job.cuts or job.absent:
        with executing(run):
            return _execute_by_hand(job)
    if job.edges:
        with executing(run):
            _run_backward(
                tuple(job.edges), tuple(job.gradients), job.retain_graph, False, (), True, accumulate_grad=True
            )
    return {}


def _execute_by_hand(job: Job) -> dict[int, Gradients]:
    """Run a job that is not a plain call."""
    cuts = {number: Cut(node) for number, node in job.cuts.items()}
    with ExitStack() as stack:
        for cut in cuts.values():
            stack.enter_context(cut)
        edges, gradients = list(job.edges), list(job.gradients)
        for node, slot in job.absent:
            edges.append(GradientEdge(node, slot))
            gradients.append(_zeros(node, slot))
            stack.callback(node.register_prehook(_nothing_for(slot)).remove)
        if edges:
            torch.autograd.backward(
                edges,
                gradients,
                retain_graph=job.retain_graph or any(cut.needs_saved for cut in cuts.values()),
                inputs=[GradientEdge(node, 0) for node in (*job.cuts.values(), *job.ends)] if cuts else None,
            )
    return {number: cut.outputs() for number, cut in cuts.items()}


def _zeros(node: Any, slot: int) -> torch.Tensor:
    """Zeros that input `slot` of `node` accepts, without memory of their own."""
    wanted = node._input_metadata[slot]
    return torch.zeros((), dtype=wanted.dtype, device=wanted.device).expand(tuple(wanted.shape))


def _nothing_for(slot: int) -> Any:
    """A pre-hook that takes the gradient of input `slot` away: torch's engine cannot begin with no gradient."""

    def pre_hook(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if index == slot else gradient for index, gradient in enumerate(gradients))

    return pre_hook
