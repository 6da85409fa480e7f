"""The last nodes of a segment, whose outputs are taken by hand (`zrpc.autograd.scheduler` says why).

torch's engine runs a cut with all its hooks. A Python function computes all its outputs whatever follows, and a
post-hook sees them. A C++ node leaves out what nothing needs, so it is called once more by itself, with the gradients
it was run on, and post-hooks that others put on it are kept back until those outputs are there. So the engine hands on
nothing of a cut, not even where it runs what the cut leads to (a leaf that other nodes of the segment lead to as well).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

Gradients = tuple[torch.Tensor | None, ...]
_PostHook = Callable[[Gradients, Gradients], Gradients | torch.Tensor | None]


class Cut:
    """One node that a segment ends with. Use it as a context around the engine call, then ask for `outputs`."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._is_python = isinstance(node, BackwardCFunction)
        self._others: dict[int, _PostHook] = {}
        self._grad_inputs: Gradients = ()
        self._grad_outputs: Gradients = ()

    @property
    def needs_saved(self) -> bool:
        """Whether what the node saved in the forward pass must outlive the engine call."""
        return not self._is_python

    def __enter__(self) -> Cut:
        self._handle = self._node.register_hook(self._see)
        if not self._is_python:
            hooks = self._hooks()
            self._others = {key: hook for key, hook in hooks.items() if key != self._handle.id}
            for key in self._others:
                del hooks[key]
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks().update(self._others)
        self._handle.remove()

    def outputs(self) -> Gradients:
        """What the node makes of its whole gradient, as after its hooks; None where there is no gradient."""
        if self._is_python:
            return self._grad_inputs
        with torch.no_grad():
            grad_inputs = _as_tuple(self._node(*self._grad_outputs))
            for hook in self._others.values():
                replaced = hook(grad_inputs, self._grad_outputs)
                if replaced is not None:
                    grad_inputs = _as_tuple(replaced)
        return grad_inputs

    def _see(self, grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
        self._grad_inputs, self._grad_outputs = grad_inputs, grad_outputs
        return (None,) * len(grad_inputs)

    def _hooks(self) -> dict[int, _PostHook]:
        hooks: dict[int, _PostHook] | None = self._handle.hooks_dict_ref()
        return {} if hooks is None else hooks


def fit(gradient: torch.Tensor, node: Any, slot: int) -> torch.Tensor:
    """`gradient` as input `slot` of `node` wants it: broadcast dimensions summed up, and of the right dtype."""
    wanted = node._input_metadata[slot]
    shape: Sequence[int] = tuple(wanted.shape)
    with torch.no_grad():
        if tuple(gradient.shape) != shape:
            gradient = gradient.sum_to_size(shape)
        return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)


def fit_leaf(gradient: torch.Tensor, node: Any, slot: int) -> torch.Tensor:
    """The same for the node of a leaf, which mostly needs nothing. To look there is quicker than to ask the node."""
    leaf: torch.Tensor = node.variable
    fits = gradient.shape == leaf.shape and gradient.dtype is leaf.dtype
    return gradient if fits else fit(gradient, node, slot)


def _as_tuple(value: Gradients | torch.Tensor | None) -> Gradients:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
