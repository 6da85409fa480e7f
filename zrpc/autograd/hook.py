"""What rides on calls: the context's id, and send and receive functions where tensors that require grad travel."""

from __future__ import annotations

import reprlib
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from zrpc.autograd import grad_mode
from zrpc.autograd.functions import RecvInfo, SendFunction, record_recv
from zrpc.autograd.grad_mode import GradMode
from zrpc.autograd.operators import OperatorSend
from zrpc.errors import AutogradError, ProtocolError
from zrpc.wire.messages import BuiltinCall, BuiltinRemote, Failure, Message, global_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.autograd.container import ContextContainer
    from zrpc.autograd.dist_context import DistAutogradContext
    from zrpc.ids import GlobalId, Incarnation, WorkerInfo
    from zrpc.wire.payload import Payload

_nothing = nullcontext()
_BUILTIN = (BuiltinCall, BuiltinRemote)


class AutogradHook:
    """A call hook of the agent. Its metadata is `[context_id, autograd message id or None, grad mode, creator]`.

    The last two are left out where they say nothing.

    A call of user code carries the context even if it sends no tensors: it may answer with some. A call of a torch
    operator answers with tensors that require grad only if it got some.

    Where gradients are off at the caller, in a context, its grad mode is a third item, and holds for the call: nothing
    of it is recorded, and what it answers with does not require grad. The context id is None if the call needs none.

    A caller that is not the creator of the context names the creator's life. An answer belongs to a context that both
    know.

    Args:
        container: the contexts of this worker.
        next_id: gives out autograd message ids.
        sends_mode: whether the grad mode of callers on this worker travels.
    """

    key = "autograd"
    is_idle = False

    def __init__(
        self, container: ContextContainer, next_id: Callable[[], GlobalId], sends_mode: Callable[[], bool]
    ) -> None:
        self._container = container
        self._next_id = next_id
        self._sends_mode = sends_mode

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """See `CallHook.send`."""
        if request_meta is not None:
            return self._send_answer(to, message, payload, request_meta)
        context = self._container.find_current()
        if context is None:
            return None
        if not torch.is_grad_enabled():
            return self._send_without_grad(context, to, message, payload)
        if payload.is_cut_off:
            _warn_once()
        tensors = [tensor for tensor in payload.tensors if tensor.requires_grad]
        if tensors:
            return self._meta(context, to, self._send_tensors(context, to, payload, tensors))
        if isinstance(message, _BUILTIN):
            return None
        return self._meta(context, to)

    def receive(
        self, source: WorkerInfo, meta: object, payload: Payload, is_reply: bool
    ) -> AbstractContextManager[None]:
        """See `CallHook.receive`. What comes for a released context is served without one.

        Raises:
            AutogradError: tensors that require grad came for one that is over here alone.
        """
        context_id, message_id, mode, creator = parse(meta)
        container = self._container
        if context_id is None:
            context = None
        elif is_reply:
            context = container.find(context_id)
        else:
            context = container.get_or_create(context_id, creator or source.incarnation)
        if context is None and context_id is not None and message_id is not None:
            container.check(context_id)
        if context is not None and message_id is not None:
            _receive_tensors(context, RecvInfo(source.incarnation, message_id, is_reply), payload)
        active = _nothing if is_reply or context is None else container.activate(context)
        return active if mode is GradMode.ENABLED else grad_mode.Entered(mode, active)

    def carry_over(self) -> AbstractContextManager[None] | None:
        """See `CallHook.carry_over`: the current context, and the grad mode."""
        context = None
        with suppress(AutogradError):  # calls say so
            context = self._container.find_current()
        if context is None:
            return None
        active, mode = self._container.activate(context), grad_mode.current()
        return active if mode is GradMode.ENABLED else grad_mode.Entered(mode, active)

    def _send_answer(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object) -> object | None:
        context_id, _, mode, _ = parse(request_meta)
        if mode is not GradMode.ENABLED or isinstance(message, Failure):  # an error is no result to be differentiated
            payload.tensors = [tensor.detach() if tensor.requires_grad else tensor for tensor in payload.tensors]
            return None
        context = None if context_id is None else self._container.find(context_id)
        if not torch.is_grad_enabled():
            return None
        if context is None:
            if context_id is not None and any(tensor.requires_grad for tensor in payload.tensors):
                self._container.check(context_id)
            return None
        if payload.is_cut_off:
            _warn_once()
        tensors = [tensor for tensor in payload.tensors if tensor.requires_grad]
        if not tensors:
            return None
        context.add_known_worker(to)
        return [context.context_id, self._send_tensors(context, to, payload, tensors)]

    def _send_tensors(
        self, context: DistAutogradContext, to: WorkerInfo, payload: Payload, tensors: list[torch.Tensor]
    ) -> GlobalId:
        """Make the send function of `tensors`; its id."""
        message_id = self._next_id()
        function = (OperatorSend if payload.is_unseen else SendFunction)(tensors, to.incarnation)
        context.add_send(message_id, function)
        payload.after = function.prepare
        return message_id

    def _meta(
        self, context: DistAutogradContext, to: WorkerInfo, message_id: GlobalId | None = None,
        mode: GradMode = GradMode.ENABLED,
    ) -> list[object]:  # fmt: skip
        """What a request to `to` carries, which knows the context from now on."""
        context.add_known_worker(to)
        if context.creator != self._container.me.incarnation:
            return [context.context_id, message_id, int(mode), context.creator]
        return (
            [context.context_id, message_id]
            if mode is GradMode.ENABLED
            else [context.context_id, message_id, int(mode)]
        )

    def _send_without_grad(
        self, context: DistAutogradContext, to: WorkerInfo, message: Message, payload: Payload
    ) -> object | None:
        mode = grad_mode.current() if self._sends_mode() else GradMode.ENABLED
        if isinstance(message, _BUILTIN):  # needs no context
            is_needed = mode is not GradMode.ENABLED and any(tensor.requires_grad for tensor in payload.tensors)
            return [None, None, int(mode)] if is_needed else None
        return self._meta(context, to, None, mode)


@cache
def _warn_once() -> None:
    warnings.warn(
        "a parameter, a module or a tensor of a subclass that requires grad is an argument or the result of a Python "
        "function, within a distributed autograd context: it arrives as a copy, and no gradient comes back to the "
        "original (so it is on torch). For gradients pass parameters to torch operators, or behind RRef(parameter) or "
        "RRef(list(module.parameters())), or send plain tensors such as `parameter * 1`. A copy that does not require "
        "grad is sent without this warning, which is given once in a process",
        stacklevel=2,
    )


def _receive_tensors(context: DistAutogradContext, info: RecvInfo, payload: Payload) -> None:
    places = [place for place, tensor in enumerate(payload.tensors) if tensor.requires_grad]
    function, outputs = record_recv(info, [payload.tensors[place] for place in places])
    context.add_recv(info.message_id, function)
    for place, output in zip(places, outputs, strict=True):
        payload.tensors[place] = output


_ID_TYPES, _LIFE_TYPES = (int, type(None)), (bytes, type(None))


def parse(meta: object) -> tuple[int | None, GlobalId | None, GradMode, Incarnation | None]:
    """What came with a call: its context, the message of it, the grad mode, and the context's creator.

    Raises:
        ProtocolError: it is something else.
    """
    try:
        fields: Any = meta
        context_id, message_id, *rest = fields
        creator = rest[1] if len(rest) > 1 else None
        is_right = type(context_id) in _ID_TYPES and type(creator) in _LIFE_TYPES
    except (TypeError, ValueError):
        is_right = False
    if not is_right:
        raise ProtocolError(f"{reprlib.repr(meta)} says nothing of an autograd context")
    mode = grad_mode.received(rest[0]) if rest else GradMode.ENABLED
    return context_id, None if message_id is None else global_id(message_id), mode, creator
