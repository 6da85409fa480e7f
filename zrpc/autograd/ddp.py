"""Parameters of DistributedDataParallel, whose gradients its C++ reducer must see.

The reducer hooks the nodes of the parameters from C++, averages what it finds in `.grad` over the process group, and
writes the average there. (For torch's own distributed autograd it looks into torch's C++ context instead; that is none
of ours.) So for the time of a pass these parameters lend their `.grad` to the context: it holds the context's gradient,
if there is one yet; torch adds to it and the reducer averages it; then the context takes it and the parameter gets its
old `.grad` back.

Which models are concerned is noted when their `forward` runs in a context. There is no public hook for that, so
`watch_models` wraps the method.

The process groups of these models are kept until the process ends. torch's hang for ever if they are destroyed before
their thread has let go of its last work: the destructor waits for that thread with the interpreter's lock, and the
thread wants the lock. A model that is the last to hold its group, and dies right after a pass, would run into that.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from zrpc.autograd.dist_context import DistAutogradContext

_Model: Any = DistributedDataParallel
_FORWARD = _Model.forward

_groups: set[Any] = set()
"""The process groups. Adding to it is atomic."""


def watch_models(current: Callable[[], DistAutogradContext | None]) -> None:
    """From now on note, in the context that `current` returns, which DistributedDataParallel models run in it."""

    @wraps(_FORWARD)
    def forward(model: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
        context = current()
        if context is not None:
            context.whole_models.add(model)
            _groups.add(model.process_group)
        return _FORWARD(model, *args, **kwargs)

    _Model.forward = forward


class WholeLeaves:
    """The parameters that lend their `.grad` to `context` for one pass: from its making until `close`."""

    def __init__(self, context: DistAutogradContext) -> None:
        self._context = context
        self._lent: dict[torch.Tensor, tuple[torch.Tensor | None, bool]] = {}
        for model in context.whole_models:
            for leaf in model._module_parameters:
                self._lend(leaf, model.gradient_as_bucket_view)

    def __contains__(self, leaf: object) -> bool:
        return leaf in self._lent

    def close(self) -> None:
        """Take the gradients into the context, and give every parameter its own back."""
        lent, self._lent = self._lent, {}
        for leaf, (own, in_bucket) in lent.items():
            if leaf.grad is not None:
                self._context.set_gradient(leaf, leaf.grad.clone() if in_bucket else leaf.grad)
            leaf.grad = own

    def _lend(self, leaf: torch.Tensor, in_bucket: bool) -> None:
        if not leaf.requires_grad or leaf in self._lent:
            return
        self._lent[leaf] = (leaf.grad, in_bucket)
        so_far = self._context.gradient(leaf)
        leaf.grad = None if so_far is None else so_far.clone()
