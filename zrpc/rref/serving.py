"""What a worker serves of RRefs: creations, and what users ask of their owner. `install` it in an agent."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from zrpc.agent.execution import execute_builtin, execute_python, run_coroutine, when_done
from zrpc.errors import CallCancelledError
from zrpc.rref.context import RRefContext
from zrpc.rref.forkdata import ForkData
from zrpc.rref.rref import backward_from
from zrpc.rref.table import RRefTable
from zrpc.rref.travel import ForkHook
from zrpc.wire import pickling, values
from zrpc.wire.messages import (
    BuiltinRemote,
    PythonRemote,
    RRefBackward,
    RRefChildAccept,
    RRefCreationFailed,
    RRefFetch,
    RRefForkRequest,
    RRefUserDelete,
)
from zrpc.wire.unanswered import CallsUnanswered

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.agent import Agent
    from zrpc.agent.request import Request
    from zrpc.errors import ZrpcError
    from zrpc.rref.context import Backward, Invoker
    from zrpc.transport.inbox import Work


class RRefServer:
    """The handlers of messages about RRefs. They run where `install` says; what they raise is the answer.

    Args:
        context: what this worker owns and uses.
    """

    def __init__(self, context: RRefContext) -> None:
        self._context = context

    # ---- serving creations -----------------------------------------------------------------------------------------

    def serve_python_remote(self, request: Request[PythonRemote]) -> None:
        """Run the function; its result, or what it raises, is the value. An asynchronous one is not waited for here."""
        is_async = request.message.async_execution
        self._serve_remote(request, lambda: execute_python(request, keep=not is_async), is_async)

    def serve_builtin_remote(self, request: Request[BuiltinRemote]) -> None:
        """Run the operator; its result, or what it raises, is the value."""
        self._serve_remote(request, lambda: execute_builtin(request.message.op, request.payload), False)

    def _serve_remote(self, request: Request[Any], execute: Callable[[], Any], async_execution: bool) -> None:
        message = request.message
        cell = self._context.creation_arrived(message.rref_id, message.fork_id, request.source)

        def finish(set_cell: Callable[[Any], None], outcome: Any) -> None:
            self._finish(request, lambda: set_cell(outcome))

        def finish_elsewhere(set_cell: Callable[[Any], None], outcome: Any) -> None:
            self._context.agent.submit(lambda: finish(set_cell, outcome))

        with ExitStack() as stack:
            try:
                stack.enter_context(request.context())
                result = execute()
                if async_execution or type(result) is CoroutineType:
                    on_value = partial(finish_elsewhere, cell.set_value)
                    on_error = partial(finish_elsewhere, cell.set_error)
                    if async_execution:
                        when_done(result, request.async_calls, on_value, on_error, request.when_cancelled)
                    else:
                        run_coroutine(result, request, on_value, on_error)
                    return
            except BaseException as error:
                finish(cell.set_error, error)
            else:
                finish(cell.set_value, result)

    def refuse_remote(self, request: Request[Any], reason: ZrpcError) -> None:
        """The function is not begun: `reason` is what asking for the value raises, for whoever else got the RRef."""
        message = request.message
        cell = self._context.creation_arrived(message.rref_id, message.fork_id, request.source)
        cell.set_error(reason)
        if message.fork_id == message.rref_id:
            self._context.finish_here(message.rref_id)
        request.fail(reason)

    def _finish(self, request: Request[Any], set_cell: Callable[[], None]) -> None:
        message = request.message
        set_cell()
        if message.fork_id == message.rref_id:
            self._context.finish_here(message.rref_id)
        request.reply()

    # ---- serving users ---------------------------------------------------------------------------------------------

    def serve_fetch(self, request: Request[RRefFetch]) -> Work | None:
        """Answer with the value, once it is set. No thread waits for it."""
        cell = self._context.wanted(request.message.rref_id, request.message.fork_id, request.source)

        def answer() -> None:
            def work() -> None:
                value = cell.get()
                request.reply(pickling.dumps(value, keep_graph=cell.is_given and values.is_typed(value)))

            request.run(work)

        if cell.is_set():
            return answer

        def answer_soon() -> None:
            self._context.agent.submit(answer)

        def called_off() -> None:
            cell.forget(answer_soon)
            request.fail(CallCancelledError("the value is not waited for any more"))

        cell.when_set(answer_soon)
        if request.is_of_users:
            request.when_cancelled(called_off)
        return None

    def serve_backward(self, request: Request[RRefBackward]) -> None:
        """Run a backward pass from the value, once it is set."""
        message = request.message
        cell = self._context.wanted(message.rref_id, message.fork_id, request.source)

        def work() -> None:
            backward_from(self._context, cell.get(), message.context_id, message.retain_graph)
            request.reply()

        def run() -> None:
            request.run(work)

        cell.when_set(lambda: self._context.agent.submit(run))

    def serve_fork_request(self, request: Request[RRefForkRequest]) -> None:
        """Count a new user."""
        self._context.fork_requested(request.message.rref_id, request.message.fork_id, request.source)
        request.reply()

    def serve_child_accept(self, request: Request[RRefChildAccept]) -> None:
        """A child of a fork here is counted."""
        self._context.decide(lambda table: table.child_accepted(request.message.fork_id))
        request.reply()

    def serve_creation_failed(self, request: Request[RRefCreationFailed]) -> None:
        """A creator has given up."""
        self._context.decide(lambda table: table.creation_failed(request.message.rref_id))
        request.reply()

    def serve_calls_unanswered(self, request: Request[CallsUnanswered]) -> None:
        """RRefs in requests that did not come, and in answers that were not read, are held by no worker."""
        caller = request.source.incarnation
        for call_id, packed in request.message:
            forks = [ForkData.unpack(one) for one in packed]
            if not request.has_beside(call_id):  # else it has come, and its answer finds nobody waiting
                self._context.decide(partial(RRefTable.unanswered, giver=caller, call_id=call_id, forks=forks))
        request.reply()

    def serve_user_delete(self, request: Request[RRefUserDelete]) -> None:
        """A user is gone."""
        message = request.message
        self._context.decide(lambda table: table.user_deleted(message.rref_id, message.fork_id))
        request.reply()


def install(agent: Agent, invoke: Invoker, backward: Backward) -> None:
    """Make `agent` serve RRefs. To be called before it joins its group. See `RRefContext`."""
    context = RRefContext(agent, invoke, backward)
    server = RRefServer(context)
    agent.extensions[RRefContext] = context
    agent.hooks.add_passengers(ForkHook(context))
    agent.handle(PythonRemote, server.serve_python_remote, inline=False, refuse=server.refuse_remote)
    agent.handle(BuiltinRemote, server.serve_builtin_remote, inline=False, refuse=server.refuse_remote)
    agent.handle(RRefFetch, server.serve_fetch, inline=True)
    agent.handle(RRefBackward, server.serve_backward, inline=True)
    agent.handle(RRefForkRequest, server.serve_fork_request, inline=True)
    agent.handle(RRefChildAccept, server.serve_child_accept, inline=True)
    agent.handle(RRefCreationFailed, server.serve_creation_failed, inline=True)
    agent.handle(CallsUnanswered, server.serve_calls_unanswered, inline=True)
    agent.handle(RRefUserDelete, server.serve_user_delete, inline=True)
    agent.on_peer_lost(context.on_peer_lost)
