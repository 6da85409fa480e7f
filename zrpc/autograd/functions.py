"""The nodes that stand in a local graph where tensors left or came: send and receive functions.

Both are `torch.autograd.Function`s under the names that torch's C++ nodes have, so that graphs and profiles read the
same. A send function has the sent tensors as inputs and one empty output; it is a source: its backward hands the
gradients that came for it to the graph behind. A receive function has the received tensors as outputs; it is a sink:
its backward gives the gradients to the run, which sends them.

A node must not hold what holds it: torch's C++ part of a node is kept alive by an output tensor, so `SendFunction` and
`RecvFunction` pair the two, and the node itself knows only ids.

Which run a node or hook is executed for is found in thread-local state. It is kept where torch's engine carries it over
to the threads it runs CUDA nodes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.autograd import Function

from zrpc.errors import AutogradError
from zrpc.staging import handover

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from zrpc.ids import GlobalId

Gradients = Sequence[torch.Tensor | None]

_RUN_KEY = "zrpc.autograd.run"
_NO_GRADIENT = torch.empty(0)
_tls: Any = torch._C  # its functions for thread-local objects are untyped


class RecvInfo(NamedTuple):
    """Where received tensors came from: the rank of their sender, and the send function there.

    Attributes:
        source: the rank.
        message_id: of the send function.
        by_answer: whether they came with an answer; else with a request. The device map by which they came follows
            from it, and so the one by which their gradients go back.
    """

    source: int
    message_id: GlobalId
    by_answer: bool = False


class Run(Protocol):
    """One engine call under way, as nodes and hooks see it. May be called on any thread of torch's engine."""

    def gradients_of(self, message_id: GlobalId) -> Gradients:
        """The gradients that came for the send function `message_id`."""

    def deliver(self, info: RecvInfo, gradients: Gradients) -> None:
        """A receive function has the gradients of its tensors."""

    def take(self, leaf: torch.Tensor, gradient: torch.Tensor) -> None:
        """A leaf has a gradient."""


def current_run() -> Run | None:
    """The run that this thread executes nodes for; None outside of distributed backward passes."""
    run: Run | None = _tls._get_obj_in_tls(_RUN_KEY) if _tls._is_key_in_tls(_RUN_KEY) else None
    return run


class executing:  # it reads as a verb: `with executing(run)`
    """A context that makes `run` the current one of this thread."""

    __slots__ = ("_outer", "_run")

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._outer = current_run()
        _tls._stash_obj_in_tls(_RUN_KEY, self._run)

    def __exit__(self, *_: object) -> None:
        _tls._stash_obj_in_tls(_RUN_KEY, self._outer)


def _run_for(what: str) -> Run:
    run = current_run()
    if run is None:
        raise AutogradError(
            f"local autograd reached {what}: use zrpc.autograd.backward(context_id, roots), which goes on from there"
        )
    return run


def _send_forward(ctx: Any, message_id: GlobalId, *tensors: torch.Tensor) -> torch.Tensor:
    del tensors
    ctx.message_id = message_id
    return torch.empty(0)


def _send_backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    run = _run_for("a send function")
    if handover.streams is not None:  # torch's engine knows no stream of this node's gradients
        handover.streams.lead_default_streams()
    return (None, *run.gradients_of(ctx.message_id))


def _recv_forward(ctx: Any, anchor: torch.Tensor, info: RecvInfo, tensors: Sequence[torch.Tensor]) -> Any:
    del anchor
    ctx.info = info
    ctx.set_materialize_grads(False)
    return (*tensors, torch.empty(0))


def _recv_backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None]:
    run = _run_for(f"a tensor that was received from the worker of rank {ctx.info.source}")
    run.deliver(ctx.info, gradients[:-1])
    return None, None, None


def _function(name: str, forward: Any, backward: Any) -> Any:
    """A `Function` whose node is called `name` + "Backward"."""
    make: Any = type(Function)
    return make(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


_SendRpc = _function("torch::distributed::autograd::SendRpc", _send_forward, _send_backward)
_RecvRpc = _function("torch::distributed::autograd::RecvRpc", _recv_forward, _recv_backward)

_anchor = torch.empty(0, requires_grad=True)
"""An input that makes torch record receive functions, which have none of their own; it never gets a gradient."""


class SendFunction(NamedTuple):
    """Attributes:
    node: the node in the graph.
    output: its empty output, which keeps it alive.
    to: the rank that the tensors went to.
    """

    node: Node
    output: torch.Tensor
    to: int


class RecvFunction(NamedTuple):
    """Attributes:
    node: the node in the graph.
    output: its empty extra output, which keeps it alive.
    info: where the tensors came from.
    """

    node: Node
    output: torch.Tensor
    info: RecvInfo


def record_send(message_id: GlobalId, tensors: Sequence[torch.Tensor], to: int) -> SendFunction:
    """Put a send function behind `tensors`, all of which require grad."""
    with torch.enable_grad():
        output = _SendRpc.apply(message_id, *tensors)
    return SendFunction(output.grad_fn, output, to)


def record_recv(info: RecvInfo, tensors: Sequence[torch.Tensor]) -> tuple[RecvFunction, list[torch.Tensor]]:
    """Put a receive function before `tensors`.

    Returns:
        The function, and the tensors that have it as `grad_fn`. They alias `tensors`.
    """
    with torch.enable_grad():
        *outputs, extra = _RecvRpc.apply(_anchor, info, [tensor.detach() for tensor in tensors])
    return RecvFunction(extra.grad_fn, extra, info), outputs


def recv_info(node: Node) -> RecvInfo | None:
    """Where the tensors of `node` came from, if it is a receive function."""
    return node.info if isinstance(node, _RecvRpc._backward_cls) else None


def source_gradient() -> torch.Tensor:
    """What to start a send function with: a gradient for its empty output."""
    return _NO_GRADIENT
