"""Running what a call names: a pickled Python function, or a torch operator by its name."""

from __future__ import annotations

import logging
from functools import cache, partial
from types import BuiltinFunctionType, CoroutineType
from typing import TYPE_CHECKING, Any

import torch

from zrpc.agent.future import Future
from zrpc.agent.scripted import call_and_keep
from zrpc.errors import ProtocolError
from zrpc.exception_text import log_error, text_of
from zrpc.functions import ASYNC_ATTRIBUTE as ASYNC_ATTRIBUTE
from zrpc.wire import loading, pickling, values

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from zrpc.agent.request import AsyncCalls, Request
    from zrpc.wire.messages import BuiltinCall, PythonCall
    from zrpc.wire.payload import Payload

    Observer = Callable[[], AbstractContextManager[None]]

log = logging.getLogger("zrpc")

_ops: Any = torch._ops  # parts of it are untyped
_Namespace, _Packet, _Overload = _ops._OpNamespace, _ops.OpOverloadPacket, _ops.OpOverload

_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """From now on enter `observer()` around each function that is run for somebody; None: around none."""
    global _observer
    _observer = observer


def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    observer = _observer
    if observer is None:
        return func(*args, **kwargs)
    failures: list[BaseException] = []
    with observer():  # no error passes through it: see `Request.run`
        try:
            return func(*args, **kwargs)
        except BaseException as failure:
            failures.append(failure)
    raise failures.pop()


def execute_python(request: Request[Any], *, keep: bool = False) -> Any:
    """Run the pickled function of `request`.

    Args:
        request: it has the pickled call, and is told which function that is.
        keep: the result stays here; that of a TorchScript function may be a `ScriptValue`.

    Returns:
        What it returns; of an `async def` function its coroutine, which is to be run (`run_coroutine`).

    Raises:
        SerializationError: this process lacks the function.
        RuntimeError: the function is TorchScript and raised anything.
        Exception: whatever the function raises.
    """
    payload = request.payload
    func, args, kwargs = pickling.loads_call(payload)
    payload.let_go()
    request.runs(func)
    if not isinstance(func, torch.jit.ScriptFunction):
        return _run(func, args, kwargs)
    try:
        result = _run(call_and_keep, (func, args, kwargs), {}) if keep else _run(func, args, kwargs)
    except torch.jit.Error as error:
        raise RuntimeError(text_of(error)) from error  # as from an operator: compiled code has no classes of errors
    return values.plain_result(result)


def execute_builtin(op: str, payload: Payload) -> Any:
    """Run the torch operator `op` (such as `aten::add` or `aten::add.Tensor`) on the packed arguments.

    Raises:
        ProtocolError: this torch has no such operator, or the arguments are not packed values.
        NotAllowedError: it may not be called here.
        RuntimeError: the arguments fit none of its schemas, or what it raises itself.
    """
    args, kwargs = values.unpack(payload)
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
    packet: Any = _operator(op)
    namespace, _, name = op.partition("::")
    found: Callable[..., Any] | None = getattr(torch._C._VariableFunctions, name, None)
    if namespace != "aten" or not isinstance(found, BuiltinFunctionType) or not isinstance(packet, _Packet):
        return None
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    on_tensors = [schema for schema in schemas if any("Tensor" in str(one.type) for one in schema.arguments)]
    one_tensor = all([str(one.type) for one in schema.returns] == ["Tensor"] for schema in on_tensors)
    return found if on_tensors and one_tensor else None


@cache
def _operator(op: str) -> Callable[..., Any]:
    """The operator of that name, or the overload; nothing else of `torch.ops` is one.

    Raises:
        ProtocolError: this torch has no such operator.
        NotAllowedError: it may not be called here.
    """
    namespace, _, name = op.partition("::")
    packet, _, overload = name.partition(".")
    loading.check_operator(namespace, packet)
    found: Any = None
    reason = "that is no operator"
    try:
        if namespace.isidentifier() and isinstance(among := getattr(torch.ops, namespace), _Namespace):
            found = getattr(among, packet)
        if overload and isinstance(found, _Packet):
            found = getattr(found, overload)
    except (AttributeError, RuntimeError) as error:
        reason = text_of(error)
    if not isinstance(found, _Packet | _Overload) or (isinstance(found, _Packet) and overload):
        raise ProtocolError(f"the torch of this worker has no operator {op}: {reason}")
    operator: Callable[..., Any] = found
    return operator


def forget_operators() -> None:
    """Look at names of operators again: another rule holds for them (`zrpc.wire.loading.use`)."""
    _function.cache_clear()
    _operator.cache_clear()


def when_done(
    result: Any, calls: AsyncCalls, on_value: Callable[[Any], None], on_error: Callable[[BaseException], None],
    when_cancelled: Callable[[Callable[[], object]], None] | None = None,
) -> None:  # fmt: skip
    """Wait, without a thread, for the future that an async_execution function returned. `calls` counts it meanwhile.

    What is given to `when_cancelled` cancels the future.

    Raises:
        RuntimeError: `result` is no future.
    """
    if not isinstance(result, torch._C.Future):
        kind = type(result).__name__
        if isinstance(result, CoroutineType):
            result.close()  # it is not to be awaited, and says so otherwise
        raise RuntimeError(
            "Functions decorated with @rpc.async_function must return a torch.futures.Future object, "
            f"but this one returned a {kind}. (Async functions must return an IValue of Future type, but got {kind})"
        )
    calls.change(1)

    def finish(future: torch.futures.Future[Any]) -> None:
        calls.change(-1)
        try:
            value = future.wait()
        except torch.jit.Error as error:  # of compiled code that was forked
            on_error(RuntimeError(text_of(error)))
        except BaseException as error:
            on_error(error)
        else:
            on_value(value)

    if isinstance(result, torch.futures.Future):
        result.add_done_callback(finish)
        if when_cancelled is not None and isinstance(result, Future):
            when_cancelled(result.cancel)
    else:  # what `then` of torch's own futures returns
        result.then(finish)


def run_coroutine(
    coroutine: CoroutineType[Any, Any, Any], request: Request[Any],
    on_value: Callable[[Any], None], on_error: Callable[[BaseException], None],
) -> None:  # fmt: skip
    """Run the coroutine of an `async def` function on the event loop of this worker.

    Raises:
        LimitError: the system gives no thread for it.
    """
    calls = request.async_calls
    calls.change(1)

    def finish(tell: Callable[[Any], None], outcome: Any) -> None:
        calls.change(-1)
        tell(outcome)

    try:
        request.event_loop.run(coroutine, request, partial(finish, on_value), partial(finish, on_error))
    except BaseException:
        calls.change(-1)
        raise


def serve_python(request: Request[PythonCall]) -> None:
    """Handle a `PythonCall`. Runs on a handler thread."""

    def fail(error: BaseException) -> None:
        _log(request, error)
        request.fail(error)

    def work() -> None:
        if request.message.async_execution:
            result = execute_python(request)
            on_value = partial(_reply, request)
            when_done(result, request.async_calls, on_value, request.fail, request.when_cancelled)
            return
        outcome = [execute_python(request)]
        if type(outcome[0]) is CoroutineType:
            run_coroutine(outcome.pop(), request, lambda value: request.reply(pickling.dumps(value)), fail)
        else:  # no name refers to the result: memory that nothing else sees may go along with it
            request.reply(pickling.dumps(outcome.pop()))

    failure = request.run(work)
    if failure is not None:
        _log(request, failure)
        del failure


def _log(request: Request[PythonCall], failure: BaseException) -> None:
    if not request.is_cancelled:
        log_error(log, "a function called by %s raised", request.source, error=failure)


def serve_builtin(request: Request[BuiltinCall]) -> None:
    """Handle a `BuiltinCall`."""

    def work() -> None:
        payload = pickling.dumps(execute_builtin(request.message.op, request.payload))
        payload.is_unseen = request.message.op.startswith("aten::")  # others may be anybody's code
        request.reply(payload)

    request.run(work)


def _reply(request: Request[PythonCall], value: Any) -> None:
    try:
        request.reply(pickling.dumps(value))
    except BaseException as error:
        request.fail(error)
