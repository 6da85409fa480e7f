"""Making RRefs: `remote_python` and `remote_builtin` ask a worker to run a call and to keep its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zrpc.errors import CallCancelledError, RpcTimeoutError, RRefError
from zrpc.exception_text import text_of
from zrpc.rref.cell import Cell
from zrpc.rref.context import RRefContext
from zrpc.rref.rref import RRef
from zrpc.wire.messages import BuiltinRemote, PythonRemote

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.ids import ForkId, RRefId, WorkerInfo
    from zrpc.wire.payload import Payload


def remote_python(
    agent: Agent, to: WorkerInfo, payload: Payload, timeout_s: float | None, async_execution: bool
) -> RRef[Any]:
    """Have `to` run the pickled call and keep its result; a reference to it.

    Args:
        payload: the pickled `(function, args, kwargs)`.
        timeout_s: how long the creation may take; 0: no limit; None: the agent's. After it, using the RRef raises.
        async_execution: the function returns a future, whose value is the result.

    Raises:
        SerializationError: a tensor of the payload cannot travel.
    """
    context: RRefContext = agent.extensions[RRefContext]
    return _create(context, to, lambda rref, fork: PythonRemote(rref, fork, async_execution), payload, timeout_s)


def remote_builtin(agent: Agent, to: WorkerInfo, op: str, payload: Payload, timeout_s: float | None) -> RRef[Any]:
    """As `remote_python`, for the torch operator `op` with the packed `(args, kwargs)`."""
    context: RRefContext = agent.extensions[RRefContext]
    return _create(context, to, lambda rref, fork: BuiltinRemote(rref, fork, op), payload, timeout_s)


def _create(
    context: RRefContext,
    to: WorkerInfo,
    make_message: Callable[[RRefId, ForkId], PythonRemote | BuiltinRemote],
    payload: Payload,
    timeout_s: float | None,
) -> RRef[Any]:
    """Ask `to` to run a call and keep its result; return a reference to it at once."""
    agent = context.agent
    if to.incarnation == agent.info.incarnation:
        return _create_here(context, make_message, payload, timeout_s)
    rref_id, fork_id = agent.ids.next(), agent.ids.next()
    context.begin_remote(rref_id, fork_id, to)
    made: RRef[Any] = RRef._of(context, to, rref_id, fork_id)
    try:
        call = agent.request(to, make_message(rref_id, fork_id), payload, timeout_s=timeout_s, hooked=True)
    except BaseException:
        context.answered(fork_id, failed=True)
        raise
    made._set_creation(call)
    call.add_done_callback(lambda done: context.answered(fork_id, done.failed), inline=True)
    return made


def _create_here(
    context: RRefContext,
    make_message: Callable[[RRefId, ForkId], PythonRemote | BuiltinRemote],
    payload: Payload,
    timeout_s: float | None,
) -> RRef[Any]:
    """remote() to this worker itself. The owner's RRef is there at once, and kept until the call is over."""
    agent = context.agent
    rref_id, cell = agent.ids.next(), Cell()
    context.begin_here(rref_id, cell)
    made: RRef[Any] = RRef._of(context, agent.info, rref_id, None, cell)

    def answered(call: Call) -> None:
        error = call.error
        may_run = issubclass(type(error), RpcTimeoutError | CallCancelledError)
        if error is not None and not may_run:
            cell.set_error(RRefError(f"RRef creation via rpc.remote() failed: {text_of(error)}"))
            context.finish_here(rref_id)

    try:
        call = agent.request(agent.info, make_message(rref_id, rref_id), payload, timeout_s=timeout_s, hooked=True)
    except BaseException:
        context.finish_here(rref_id)
        raise
    made._set_creation(call)
    # Not on the reading thread: it may unpickle an exception.
    call.add_done_callback(lambda done: agent.completions.submit(lambda: answered(done)))
    return made
