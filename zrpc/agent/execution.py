"""Running what a call names: a pickled Python function, or a torch operator by its name."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import ProtocolError
from zrpc.wire import pickling, values

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from zrpc.agent.request import Request
    from zrpc.wire.messages import BuiltinCall, PythonCall
    from zrpc.wire.payload import Payload

    Observer = Callable[[], AbstractContextManager[None]]

log = logging.getLogger("zrpc")

ASYNC_ATTRIBUTE = "_wrapped_async_rpc_function"
"""What `functions.async_execution` leaves on a function; the name is torch's, whose decorator works here too."""


_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """From now on enter `observer()` around each function that is run for somebody; None: around none."""
    global _observer
    _observer = observer


def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    observer = _observer
    if observer is None:
        return func(*args, **kwargs)
    with observer():
        return func(*args, **kwargs)


def execute_python(payload: Payload) -> Any:
    """Run the pickled function of `payload`.

    Raises:
        SerializationError: this process lacks the function.
        RuntimeError: the function is TorchScript and raised anything.
        Exception: whatever the function raises.
    """
    func, args, kwargs = pickling.loads(payload)
    payload.let_go()
    try:
        result = _run(func, args, kwargs)
    except torch.jit.Error as error:
        if not isinstance(func, torch.jit.ScriptFunction):
            raise
        raise RuntimeError(str(error)) from error  # as from an operator: callers of compiled code expect no class of it
    return values.plain_result(result) if isinstance(func, torch.jit.ScriptFunction) else result


def execute_builtin(op: str, payload: Payload) -> Any:
    """Run the torch operator `op` (such as `aten::add` or `aten::add.Tensor`) on the packed arguments.

    Raises:
        ProtocolError: this torch has no such operator.
        RuntimeError: the arguments fit none of its schemas, or what it raises itself.
    """
    args, kwargs = pickling.loads(payload)
    payload.let_go()
    function = _function(op)
    if function is not None:
        try:
            return _run(function, args, kwargs)
        except TypeError:  # the arguments are not for it; maybe for the operator, which also says what it takes
            pass
    return _run(_operator(op), args, kwargs)


@cache
def _function(op: str) -> Callable[..., Any] | None:
    """torch's function for an operator that makes one tensor of tensors, if there is one.

    It takes a third of the time to choose an overload. Several tensors it would return as another type.
    """
    namespace, _, name = op.partition("::")
    found: Callable[..., Any] | None = getattr(torch._C._VariableFunctions, name, None)
    if namespace != "aten" or found is None:
        return None
    packet: Any = _operator(op)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    on_tensors = [schema for schema in schemas if any("Tensor" in str(one.type) for one in schema.arguments)]
    one_tensor = all([str(one.type) for one in schema.returns] == ["Tensor"] for schema in on_tensors)
    return found if on_tensors and one_tensor else None


@cache
def _operator(op: str) -> Callable[..., Any]:
    namespace, _, name = op.partition("::")
    packet, _, overload = name.partition(".")
    try:
        found: Callable[..., Any] = getattr(getattr(torch.ops, namespace), packet)
        if overload:
            found = getattr(found, overload)
    except (AttributeError, RuntimeError) as error:
        raise ProtocolError(f"the torch of this worker has no operator {op}: {error}") from error
    return found


def when_done(
    result: Any, func_text: str, on_value: Callable[[Any], None], on_error: Callable[[BaseException], None]
) -> None:
    """Wait, without a thread, for the future that an async_execution function returned.

    Raises:
        RuntimeError: `result` is no future.
    """
    if not isinstance(result, torch._C.Future):
        raise RuntimeError(
            "Functions decorated with @rpc.async_function must return a torch.futures.Future object, "
            f"but {func_text} returned a {type(result).__name__}"
        )

    def finish(future: torch.futures.Future[Any]) -> None:
        try:
            value = future.wait()
        except Exception as error:
            on_error(error)
        else:
            on_value(value)

    if isinstance(result, torch.futures.Future):
        result.add_done_callback(finish)
    else:  # what `then` of torch's own futures returns
        result.then(finish)


def serve_python(request: Request[PythonCall]) -> None:
    """Handle a `PythonCall`. Runs on a handler thread."""
    try:
        with request.context():
            if not request.message.async_execution:
                request.reply(pickling.dumps(execute_python(request.payload)))
                return
            when_done(
                execute_python(request.payload),
                "this one",
                lambda value: _reply(request, value),
                request.fail,
            )
    except BaseException as error:
        log.error("a function called by %s raised", request.source, exc_info=error)
        request.fail(error)


def serve_builtin(request: Request[BuiltinCall]) -> None:
    """Handle a `BuiltinCall`."""
    try:
        with request.context():
            payload = pickling.dumps(execute_builtin(request.message.op, request.payload))
            payload.is_unseen = request.message.op.startswith("aten::")  # others may be anybody's code
            request.reply(payload)
    except BaseException as error:
        request.fail(error)


def _reply(request: Request[PythonCall], value: Any) -> None:
    try:
        request.reply(pickling.dumps(value))
    except BaseException as error:
        request.fail(error)
