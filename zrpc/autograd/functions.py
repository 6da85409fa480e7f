"""What stands in a local graph where tensors left or came: send and receive functions.

Nothing in the graph leads to a send function, so it is no node of torch's: only the edges into the graph along which
the gradients go that come for it. It has the name and the `next_functions` that torch's has, for who looks. A receive
function has the received tensors as outputs; it is a sink: its backward gives the gradients to the run, which sends
them. It is a `torch.autograd.Function`, under the name of torch's C++ node.

A node must not hold what holds it: torch's C++ part of a Python node is kept alive by an output tensor, or by a C++
node that leads to it. `SendFunction` holds such, nobody holds a receive function, and the node itself knows only ids.

Which run a node or hook is executed for is found in thread-local state. It is kept where torch's engine carries it over
to the threads it runs CUDA nodes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.autograd import Function

from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from zrpc.ids import GlobalId, Incarnation

Gradients = Sequence[torch.Tensor | None]

Edge = tuple["Node", int]
"""A node, and which of its inputs."""

_nothing = nullcontext()
_RUN_KEY = "zrpc.autograd.run"
_tls: Any = torch._C  # its functions for thread-local objects are untyped


class RecvInfo(NamedTuple):
    """Where received tensors came from: the life of their sender, and the send function there.

    Attributes:
        source: the life.
        message_id: of the send function.
        by_answer: whether they came with an answer; else with a request. The device map by which they came follows
            from it, and so the one by which their gradients go back.
    """

    source: Incarnation
    message_id: GlobalId
    by_answer: bool = False


class LoneNode(Protocol):
    """A node that may be called without torch's engine: see `zrpc.autograd.operators.Operator`."""

    @property
    def info(self) -> RecvInfo:
        """Where the tensors came from that its outputs are gradients of."""

    def run(self, gradient: torch.Tensor | None) -> Gradients:
        """The gradients for them."""


class Run(Protocol):
    """One engine call under way, as nodes and hooks see it. May be called on any thread of torch's engine."""

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


def _alias_forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
    del ctx
    return tensor.detach()


def _alias_backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    del ctx
    return gradient


def _recv_forward(ctx: Any, anchor: torch.Tensor, info: RecvInfo, tensors: Sequence[torch.Tensor]) -> Any:
    del anchor
    ctx.info = info
    ctx.set_materialize_grads(False)
    return tuple(tensors)


def _recv_backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, None, None]:
    run = current_run()
    if run is None:
        raise AutogradError(
            "local autograd reached a tensor that was received from the worker of rank "
            f"{ctx.info.message_id.created_on}: use "
            "zrpc.autograd.backward(context_id, roots), which goes on from there"
        )
    run.deliver(ctx.info, gradients)
    return None, None, None


def _function(name: str, forward: Any, backward: Any) -> Any:
    """A `Function` whose node is called `name` + "Backward"."""
    make: Any = type(Function)
    return make(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


_Alias = _function("Alias", _alias_forward, _alias_backward)
_RecvRpc = _function("torch::distributed::autograd::RecvRpc", _recv_forward, _recv_backward)

_apply_recv: Any = super(Function, _RecvRpc).apply
"""Without what `Function.apply` does for functorch, whose transforms no call goes through."""


@cache
def _anchor() -> torch.Tensor:
    """An input that makes torch record receive functions, which have none of their own; it never gets a gradient.

    It is not made while this module is imported: torch's first tensor takes 0.6 MB, which an idle worker does without.
    """
    with torch.inference_mode(False):
        return torch.empty(0, device="cpu", requires_grad=True)


SEND_NAME = "torch::distributed::autograd::SendRpcBackward"


class SendFunction:
    """Where the gradients go that come for a message. Any thread may use it.

    Args:
        tensors: what was sent, all of which require grad. They are kept until `locate` only.
        to: the life that they went to.
    """

    __slots__ = ("_found", "to")

    def __init__(self, tensors: Sequence[torch.Tensor], to: Incarnation) -> None:
        self.to = to
        self._found: Sequence[torch.Tensor] | Found = tensors

    @property
    def next_functions(self) -> tuple[Edge, ...]:
        """The same as `edges`, under the name that torch's has."""
        return self.edges

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges into the graph, one a tensor that was sent."""
        return self.locate().edges

    def prepare(self) -> None:
        """Do now what need not be done when gradients come."""
        self.locate()

    @property
    def operator(self) -> LoneNode | None:
        """What may be run by itself instead of these."""
        return None

    def spend(self) -> None:
        """Its operator has run in a pass that need not retain the graph."""

    def locate(self) -> Found:
        """Find the edges, unless it is done. It takes a while, so it is put off until the message is on its way."""
        found = self._found
        if not isinstance(found, Found):  # two threads may find the same at once
            found = self._found = self._find(found)
        return found

    def _find(self, tensors: Sequence[torch.Tensor]) -> Found:
        return _locate(tensors)

    def name(self) -> str:
        """The name that torch's has."""
        return SEND_NAME


class Found(NamedTuple):
    """Where in the graph some tensors are; `owners` keep alive what the edges lead to."""

    edges: tuple[Edge, ...]
    owners: Sequence[object]


def _locate(tensors: Sequence[torch.Tensor]) -> Found:
    edges: list[Edge] = []
    owners: list[object] = []
    for tensor in tensors:
        node = tensor.grad_fn
        if node is None or isinstance(node, torch._C._FunctionBase):
            owner, node = _owner(tensor)
            owners.append(owner)
        edges.append((node, tensor.output_nr))
    return Found(tuple(edges), owners)


def _owner(tensor: torch.Tensor) -> tuple[object, Node]:
    """The node of a leaf, or of an output of a Python node, behind something that keeps it alive."""
    strided = tensor.layout is torch.strided
    with _nothing if torch.is_grad_enabled() else torch.enable_grad():
        alias: torch.Tensor = tensor.view_as(tensor) if strided else _Alias.apply(tensor)
    assert alias.grad_fn is not None
    node: Any = alias.grad_fn.next_functions[0][0]
    return (alias.grad_fn if strided else alias), node


def record_recv(info: RecvInfo, tensors: Sequence[torch.Tensor]) -> tuple[Node, Sequence[torch.Tensor]]:
    """Put a receive function before `tensors`, which are leaves, fresh and not empty in number.

    Returns:
        The function, which lives as long as one of the tensors or what was made of them; and tensors that have it as
        `grad_fn`: the same, or aliases where they are views, which could not be written to after.
    """
    arguments = (_anchor(), info, [one.detach() if one._is_view() else one.requires_grad_(False) for one in tensors])
    with _nothing if torch.is_grad_enabled() else torch.enable_grad():  # to enter it takes longer than to ask
        outputs = _apply_recv(*arguments)
    return outputs[0].grad_fn, outputs


def recv_info(node: Node) -> RecvInfo | None:
    """Where the tensors of `node` came from, if it is a receive function."""
    return node.info if isinstance(node, _RecvRpc._backward_cls) else None
