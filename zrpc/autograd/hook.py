"""What rides on calls: the context's id, and send and receive functions where tensors that require grad travel."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from zrpc.autograd.functions import RecvInfo, SendFunction, record_recv
from zrpc.autograd.operators import OperatorSend
from zrpc.ids import GlobalId, WorkerInfo
from zrpc.wire.messages import BuiltinCall, BuiltinRemote, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.autograd.container import ContextContainer
    from zrpc.autograd.dist_context import DistAutogradContext
    from zrpc.wire.payload import Payload

_nothing = nullcontext()
_BUILTIN = (BuiltinCall, BuiltinRemote)


class AutogradHook:
    """A call hook of the agent. Its metadata is `[context_id, autograd message id or None]`.

    A call of user code carries the context even if it sends no tensors: it may answer with some. A call of a torch
    operator answers with tensors that require grad only if it got some.

    Args:
        container: the contexts of this worker.
        next_id: gives out autograd message ids.
    """

    key = "autograd"

    def __init__(self, container: ContextContainer, next_id: Callable[[], GlobalId]) -> None:
        self._container = container
        self._next_id = next_id

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """See `CallHook.send`."""
        context = self._context_of(request_meta)
        if context is None:
            return None
        if payload.is_cut_off and torch.is_grad_enabled():
            _warn_once()
        tensors = [tensor for tensor in payload.tensors if tensor.requires_grad] if torch.is_grad_enabled() else []
        if not tensors and (request_meta is not None or isinstance(message, _BUILTIN)):
            return None
        context.add_known_worker(to.id)
        if not tensors:
            return [context.context_id, None]
        message_id = self._next_id()
        function = (OperatorSend if payload.is_unseen else SendFunction)(tensors, to.id)
        context.add_send(message_id, function)
        payload.after = function.prepare
        return [context.context_id, message_id]

    def receive(
        self, source: WorkerInfo, meta: object, payload: Payload, is_reply: bool
    ) -> AbstractContextManager[None]:
        """See `CallHook.receive`. What comes for a released context is served without one."""
        context_id, message_id = _parse(meta)
        container = self._container
        context = container.get_or_create(context_id)
        if context is None:
            return _nothing
        if message_id is not None:
            _receive_tensors(context, RecvInfo(source.id, message_id, is_reply), payload)
        return _nothing if is_reply else container.activate(context)

    def _context_of(self, request_meta: object | None) -> DistAutogradContext | None:
        if request_meta is None:
            return self._container.find_current()
        return self._container.find(_parse(request_meta)[0])


@cache
def _warn_once() -> None:
    warnings.warn(
        "a parameter, a module or a tensor of a subclass that requires grad is an argument or the result of a Python "
        "function, within a distributed autograd context: it arrives as a copy, and no gradient comes back to the "
        "original (so it is on torch). For gradients pass parameters to torch operators, or behind RRef(parameter) or "
        "RRef(list(module.parameters())), or send plain tensors such as `parameter * 1`. To send copies without this "
        "warning, which is given once in a process, make the call under torch.no_grad()",
        stacklevel=2,
    )


def _receive_tensors(context: DistAutogradContext, info: RecvInfo, payload: Payload) -> None:
    places = [place for place, tensor in enumerate(payload.tensors) if tensor.requires_grad]
    function, outputs = record_recv(info, [payload.tensors[place] for place in places])
    context.add_recv(info.message_id, function)
    for place, output in zip(places, outputs, strict=True):
        payload.tensors[place] = output


def _parse(meta: object) -> tuple[int, GlobalId | None]:
    fields: Any = meta
    context_id, message_id = fields
    return context_id, None if message_id is None else GlobalId(*message_id)
