"""Calls: `rpc_sync`, `rpc_async`, `remote`, `get_worker_info`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zrpc import interrupts
from zrpc.agent.broadcast import call_all
from zrpc.agent.current import current_agent
from zrpc.agent.execution import ASYNC_ATTRIBUTE
from zrpc.agent.future import Future, future_of
from zrpc.agent.retry import RetryPolicy, check_policy
from zrpc.agent.retry import call as call_again
from zrpc.agent.retry import call_async as begin_again
from zrpc.agent.scripted import check_arguments
from zrpc.config import UNSET_RPC_TIMEOUT_S, check_timeout
from zrpc.errors import DrainingError
from zrpc.functions import name_of
from zrpc.ids import WorkerInfo
from zrpc.profiling import ExecMode, is_profiling, record, sending
from zrpc.rref.making import remote_builtin, remote_python
from zrpc.wire import by_value, pickling, values
from zrpc.wire.messages import BuiltinCall, Message, PythonCall
from zrpc.wire.scripting import qualified_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.rref.rref import RRef
    from zrpc.wire.payload import Payload

T = TypeVar("T")
Worker = str | int | WorkerInfo

_pickle_call: Callable[[tuple[Any, ...]], Payload] = pickling.dumps_call


def set_call_pickler(dumps: Callable[[tuple[Any, ...]], Payload] | None) -> None:
    """From now on pickle `(function, args, kwargs)` of outgoing calls with `dumps`; None: with zrpc's own.

    What it makes must be readable by `zrpc.wire.pickling.loads`.
    """
    global _pickle_call
    _pickle_call = dumps or pickling.dumps_call


def use_codec(codec: pickling.Codec) -> None:
    """See `pickling.use`; a pickler that `set_call_pickler` set stays."""
    is_own = _pickle_call == pickling.dumps_call
    pickling.use(codec)
    if is_own:
        set_call_pickler(None)


def rpc_sync(
    to: Worker,
    func: Callable[..., T],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT_S,
    *,
    retry: RetryPolicy | None = None,
    wait_for_worker: float | None = None,
) -> T:
    """Call `func(*args, **kwargs)` on the worker `to` and wait for its result.

    Args:
        to: name, rank or `WorkerInfo` of the callee.
        func: what the callee runs: a torch operator, or anything callable that pickle can name or copy.
        args: positional arguments, a tuple or a list; tensors in them are sent without a copy and may be written to
            again on return.
        kwargs: keyword arguments, a dict.
        timeout: seconds; 0: no limit; by default `rpc_timeout` of the options. In a function that serves a call it is
            no more than what is left of that one's (`time_remaining`), 0 included.
        wait_for_worker: for how many seconds to wait for a worker of that name or rank where there is none, or it
            drains; 0: not at all; by default that of the options. In a static group none comes.
        retry: make the call again after some errors; only for functions that may run more than once.

    Returns:
        What `func` returned; its tensors are copies that belong to the caller.

    Raises:
        NotInitializedError: `init_rpc` was not called.
        UnknownWorkerError: no such worker.
        DrainingError: it takes no new calls, as it is about to end; `func` did not run.
        TypeError: `func` cannot be called, or `args` or `kwargs` are of another type.
        ValueError: `to` is of another type.
        ConfigError: `timeout` is no number of seconds.
        SerializationError: an argument or the result cannot be sent.
        DeviceError: a tensor cannot be brought to the device where it should arrive.
        OverloadedError: too much is on the way to that worker already, for as long as the time limit, or too many calls
            wait there (`max_queued_calls` of its options). `func` did not run.
        CallCancelledError: the call that this thread serves was cancelled meanwhile.
        LimitError: this process may open no more files.
        AgentClosedError: this worker shut down meanwhile.
        RpcTimeoutError: the time ran out; it is not known whether `func` ran.
        PeerLostError: the callee died or left; it is not known whether `func` ran.
        Exception: whatever `func` raised there, with the remote traceback as its cause.
    """
    if retry is not None:
        check_policy(retry)
        limit_s = _whole_limit_s(timeout)
        return call_again(
            retry, limit_s, lambda left_s: rpc_sync(to, func, args, kwargs, left_s, wait_for_worker=wait_for_worker)
        )
    with interrupts.deferred:
        agent = current_agent()
        return pickling.loads(_call(agent, ExecMode.SYNC, to, func, args, kwargs, timeout, wait_for_worker).wait())  # type: ignore[no-any-return]


def rpc_async(
    to: Worker,
    func: Callable[..., T],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT_S,
    *,
    retry: RetryPolicy | None = None,
    wait_for_worker: float | None = None,
) -> Future[T]:
    """Call `func(*args, **kwargs)` on the worker `to` and return a future for its result at once.

    Arguments, timeout and errors are those of `rpc_sync`; errors of the call are raised by the future. Tensors in the
    arguments must not be written to until the future is done. `Future.cancel` calls it off; to drop it does not.
    """
    if retry is not None:
        check_policy(retry)
        if not callable(func):
            raise _not_callable(func)
        agent, what = current_agent(), f"a call with retry to {to}"
        return begin_again(
            retry,
            _whole_limit_s(timeout),
            lambda left_s: begin(ExecMode.ASYNC, to, func, args, kwargs, left_s, wait_for_worker),
            agent,
            what,
        )
    return begin(ExecMode.ASYNC, to, func, args, kwargs, timeout, wait_for_worker)


def begin(
    mode: ExecMode, to: Worker, func: Callable[..., T], args: Any, kwargs: Any, timeout: float,
    wait_for_worker: float | None = None,
) -> Future[T]:  # fmt: skip
    """As `rpc_async`; profiles name the call after `mode`."""
    with interrupts.deferred:
        agent = current_agent()
        call = _call(agent, mode, to, func, args, kwargs, timeout, wait_for_worker)
        return future_of(call, pickling.loads, agent.completions)


def remote(
    to: Worker,
    func: Callable[..., T],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT_S,
    *,
    wait_for_worker: float | None = None,
) -> RRef[T]:
    """Call `func(*args, **kwargs)` on the worker `to`, leave its result there, and return a reference to it at once.

    Arguments are those of `rpc_sync`. An error of the call is raised when the reference is used.
    """
    with interrupts.deferred:
        return _create(to, func, args, kwargs, timeout, wait_for_worker)


def _create(
    to: Worker, func: Callable[..., T], args: Any, kwargs: Any, timeout: float, wait_for_worker: float | None
) -> RRef[T]:
    agent = current_agent()
    if not callable(func):
        raise _not_callable(func)
    info = agent.resolve(to, wait_for_worker)
    is_async = getattr(func, ASYNC_ATTRIBUTE, None) is not None
    if is_async:
        func = _bare(func)
    op, payload = _take_apart(func, args, kwargs)
    if op is None and (by_value.MAIN in payload.data or (payload.buffers and by_value.names_main(payload))):
        payload = _for_another_main(agent, info, payload, func, args, kwargs)
    limit_s = _limit_s(timeout)
    if isinstance(func, torch.jit.ScriptFunction):
        check_arguments(func, args or (), kwargs or {})

    def make() -> RRef[T]:
        if op is not None:
            return remote_builtin(agent, info, op, payload, limit_s)
        return remote_python(agent, info, payload, limit_s, is_async)

    if not is_profiling():
        return make()
    recording = record(agent, ExecMode.REMOTE, function_name(func), info)
    with sending(recording):
        made = make()
    created = made._get_future()
    created.add_done_callback(recording.finish)
    made._set_profiling_future(created)
    return made


def broadcast(
    workers: Iterable[Worker],
    func: Callable[..., T],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT_S,
) -> list[Future[T]]:
    """Call `func(*args, **kwargs)` on each of `workers`; a future for each result at once, in their order.

    It is as one `rpc_async` to each, but the call is pickled once. Workers of one host also share one copy of its
    tensors and arrays, in shared memory. Each may write to its own: a page that a callee writes to becomes a copy there
    (copy-on-write).

    Each callee gets a call of its own, as by `rpc_async`, where the call carries RRefs, CUDA tensors or, in an autograd
    context, tensors that require grad, and while a profiler runs.

    Args:
        workers: names, ranks or `WorkerInfo`s of the callees.
        func: as in `rpc_sync`.
        args: as in `rpc_sync`. Tensors in them must not be written to until all futures are done.
        kwargs: as in `rpc_sync`.
        timeout: of each call; seconds; 0: no limit; by default `rpc_timeout` of the options.

    Raises:
        TypeError: `workers` is one worker, or as in `rpc_sync`.
        UnknownWorkerError: one of them does not exist. Nothing was sent.
        SerializationError: an argument cannot be sent. Errors of the calls are raised by their futures.
    """
    if isinstance(workers, str | int | WorkerInfo):
        raise TypeError(f"workers must be several, as in ['worker1', 'worker2'], not {workers!r}")
    with interrupts.deferred:
        agent = current_agent()
        if not callable(func):
            raise _not_callable(func)
        receivers = [agent.resolve(to, None) for to in workers]
        is_async = getattr(func, ASYNC_ATTRIBUTE, None) is not None
        sent = _bare(func) if is_async else func
        op, payload = _take_apart(sent, args, kwargs)
        if op is None and (by_value.MAIN in payload.data or (payload.buffers and by_value.names_main(payload))):
            for to in receivers:
                payload = _for_another_main(agent, to, payload, sent, args, kwargs)
        message: Message = PythonCall(is_async) if op is None else BuiltinCall(op)
        calls = None if is_profiling() else call_all(agent, receivers, message, payload, _limit_s(timeout))
        del payload
        if calls is None:
            return [begin(ExecMode.ASYNC, to, func, args, kwargs, timeout) for to in receivers]
        return [future_of(call, pickling.loads, agent.completions) for call in calls]


def get_worker_info(worker_name: str | None = None) -> WorkerInfo:
    """Name and rank of the worker `worker_name`, or of this one.

    Raises:
        UnknownWorkerError: no such worker (yet).
    """
    agent = current_agent()
    if worker_name is None:
        return agent.info
    try:
        return agent.resolve(worker_name)
    except DrainingError:  # to ask who it is is no call
        return agent.members.find(worker_name)


def _call(
    agent: Agent, mode: ExecMode, to: Worker, func: Callable[..., Any], args: Any, kwargs: Any, timeout: float,
    wait_for_worker: float | None,
) -> Call:  # fmt: skip
    if not callable(func):
        raise _not_callable(func)
    info = agent.resolve(to, wait_for_worker)
    is_async = getattr(func, ASYNC_ATTRIBUTE, None) is not None
    if is_async:
        func = _bare(func)
    op, payload = _take_apart(func, args, kwargs)
    if op is None and (by_value.MAIN in payload.data or (payload.buffers and by_value.names_main(payload))):
        payload = _for_another_main(agent, info, payload, func, args, kwargs)
    message: Message = PythonCall(is_async) if op is None else BuiltinCall(op)
    limit_s, waited = None if timeout == UNSET_RPC_TIMEOUT_S else timeout, mode is ExecMode.SYNC
    if not is_profiling():
        name = name_of(func)
        return agent.request(info, message, payload, timeout_s=limit_s, hooked=True, waited=waited, function=name)
    recording = record(agent, mode, function_name(func), info)
    with sending(recording):
        call = agent.request(info, message, payload, timeout_s=limit_s, hooked=True, waited=waited)
    recording.began(call)
    return call


def _for_another_main(
    agent: Agent, to: WorkerInfo, payload: Payload, func: Callable[..., Any], args: Any, kwargs: Any
) -> Payload:
    """What is to be sent of a call that names something of `__main__`: `to` may run another script, or a notebook."""
    member = agent.members.by_incarnation(to.incarnation)
    is_same = member is None or member.card.get(by_value.CARD_KEY) == by_value.identity()
    is_pickled = agent.options.allow != "registered" and _pickle_call == pickling.dumps_call
    if is_same or not is_pickled or isinstance(func, torch.jit.ScriptFunction) or not by_value.pickler_class():
        return payload
    if (
        agent.options.allow == "registered"
        or _pickle_call != pickling.dumps_call
        or isinstance(func, torch.jit.ScriptFunction)
    ):
        return payload
    return pickling.dumps_by_value((func, _as_tuple(args), {} if kwargs is None else _as_dict(kwargs)))


def _not_callable(func: object) -> TypeError:
    return TypeError(f"function should be callable, and this is a {type(func).__name__}.")


def _bare(func: Callable[..., Any]) -> Callable[..., Any]:
    """What travels of a function that `async_execution` marks: a TorchScript function without the mark."""
    inner: Any = func
    while (deeper := getattr(inner, ASYNC_ATTRIBUTE, None)) is not None:
        inner = deeper
    return inner if isinstance(inner, torch.jit.ScriptFunction) else func


def _whole_limit_s(timeout: float) -> float:
    """The time limit of a call and of what repeats it, in seconds; 0: none."""
    return current_agent().rpc_timeout_s if timeout == UNSET_RPC_TIMEOUT_S else check_timeout(timeout, "timeout")


def _limit_s(timeout: float) -> float | None:
    return None if timeout == UNSET_RPC_TIMEOUT_S else timeout


def _take_apart(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[str | None, Payload]:
    """A torch operator's name and its packed arguments; for everything else None and a pickle."""
    call_args = args if type(args) is tuple else _as_tuple(args)
    call_kwargs = {} if kwargs is None else _as_dict(kwargs)
    op = operator_name(func)
    if op is not None:
        try:
            return op, values.pack([list(call_args), call_kwargs])
        except values.UnpackableError:
            pass
    if op is not None or isinstance(func, torch.jit.ScriptFunction):  # gradients pass through these, as in torch
        return None, pickling.dumps_call((func, call_args, call_kwargs), keep_graph=True)
    return None, _pickle_call((func, call_args, call_kwargs))


def _as_tuple(args: Any) -> tuple[Any, ...]:
    if args is not None and not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple or a list, as in args=(x,), not a {type(args).__name__}")
    return tuple(args or ())


def _as_dict(kwargs: Any) -> dict[str, Any]:
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a dict, name -> argument, not a {type(kwargs).__name__}")
    return dict(kwargs)


def function_name(func: Callable[..., Any]) -> str:
    """What `func` is called in profiles: an operator's or scripted function's qualified name, else its own."""
    op = operator_name(func)
    if op is not None:
        return op
    if isinstance(func, torch.jit.ScriptFunction):
        return qualified_name(func)
    return str(getattr(func, "__qualname__", type(func).__qualname__))


def operator_name(func: Callable[..., Any]) -> str | None:
    """`func` as a torch operator, such as `aten::add` (or `aten::add.Tensor` for one overload); None if it is none."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        return str(func._qualified_op_name)
    if isinstance(func, torch._ops.OpOverload):
        return str(func.name())  # type: ignore[no-untyped-call]
    name: str | None = torch.jit._builtins._find_builtin(func)  # type: ignore[no-untyped-call]
    return name
