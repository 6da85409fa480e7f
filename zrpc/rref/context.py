"""RRefs in an agent: `install` them, make them with `remote_python` and `remote_builtin`, and serve what others ask."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.agent.execution import execute_builtin, execute_python, when_done
from zrpc.errors import RpcTimeoutError, RRefError
from zrpc.exception_text import text_of
from zrpc.rref.cell import Cell
from zrpc.rref.ledger import Ledger
from zrpc.rref.owners import Availability
from zrpc.rref.rref import RRef, backward_from
from zrpc.rref.travel import ForkHook
from zrpc.wire import pickling, values
from zrpc.wire.messages import (
    BuiltinRemote,
    PythonRemote,
    RRefBackward,
    RRefChildAccept,
    RRefFetch,
    RRefForkRequest,
    RRefUserDelete,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.agent.request import Request
    from zrpc.ids import ForkId, RRefId, WorkerInfo
    from zrpc.rref.actions import Action
    from zrpc.rref.table import RRefTable
    from zrpc.transport.inbox import Work
    from zrpc.wire.payload import Payload


class RRefContext(Ledger):
    """A worker's ledger, and what it does with messages and calls. Its handlers run where `install` says."""

    # ---- making RRefs ----------------------------------------------------------------------------------------------

    def create(
        self,
        to: WorkerInfo,
        make_message: Callable[[RRefId, ForkId], PythonRemote | BuiltinRemote],
        payload: Payload,
        timeout_s: float | None,
    ) -> RRef[Any]:
        """Ask `to` to run a call and keep its result; return a reference to it at once."""
        if to.incarnation == self.agent.info.incarnation:
            return self._create_here(make_message, payload, timeout_s)
        rref_id, fork_id = self.agent.ids.next(), self.agent.ids.next()
        with self._lock:
            self._check_open("init_rpc made another one since.")
            self._table.create(rref_id, fork_id, to.incarnation)
        self._watch(to.incarnation)
        made: RRef[Any] = RRef._of(self, to, rref_id, fork_id)

        def answered(call: Call) -> None:
            failed = call.failed
            self._decide(lambda table: table.failed(fork_id) if failed else table.acknowledged(fork_id))

        try:
            call = self.agent.request(to, make_message(rref_id, fork_id), payload, timeout_s=timeout_s, hooked=True)
        except BaseException:
            self._decide(lambda table: table.failed(fork_id))
            raise
        made._call = call
        call.add_done_callback(answered)
        return made

    def _create_here(
        self,
        make_message: Callable[[RRefId, ForkId], PythonRemote | BuiltinRemote],
        payload: Payload,
        timeout_s: float | None,
    ) -> RRef[Any]:
        """remote() to this worker itself. The owner's RRef is there at once, and kept until the call is over."""
        rref_id = self.agent.ids.next()
        cell = Cell()
        with self._lock:
            self._check_open("init_rpc made another one since.")
            self._table.begin_here(rref_id)
            self._cells[rref_id] = cell
        made: RRef[Any] = RRef._of(self, self.agent.info, rref_id, None, cell)

        def answered(call: Call) -> None:
            error = call.error
            if error is not None and not issubclass(type(error), RpcTimeoutError):  # else the function may still run
                cell.set_error(RRefError(f"RRef creation via rpc.remote() failed: {text_of(error)}"))
                self._decide(lambda table: table.finish_here(rref_id))

        try:
            call = self.agent.request(
                self.agent.info, make_message(rref_id, rref_id), payload, timeout_s=timeout_s, hooked=True
            )
        except BaseException:
            self._decide(lambda table: table.finish_here(rref_id))
            raise
        made._call = call
        # Not on the reading thread: it may unpickle an exception.
        call.add_done_callback(lambda done: self.agent.completions.submit(lambda: answered(done)))
        return made

    # ---- serving creations -----------------------------------------------------------------------------------------

    def serve_python_remote(self, request: Request[PythonRemote]) -> None:
        """Run the function; its result, or what it raises, is the value. An asynchronous one is not waited for here."""
        is_async = request.message.async_execution
        self._serve_remote(request, lambda: execute_python(request.payload, keep=not is_async), is_async)

    def serve_builtin_remote(self, request: Request[BuiltinRemote]) -> None:
        """Run the operator; its result, or what it raises, is the value."""
        self._serve_remote(request, lambda: execute_builtin(request.message.op, request.payload), False)

    def _serve_remote(self, request: Request[Any], execute: Callable[[], Any], async_execution: bool) -> None:
        cell = self._begin(request)

        def finish(set_cell: Callable[[Any], None], outcome: Any) -> None:
            self._finish(request, lambda: set_cell(outcome))

        def finish_elsewhere(set_cell: Callable[[Any], None], outcome: Any) -> None:
            self.agent.submit(lambda: finish(set_cell, outcome))

        with ExitStack() as stack:
            try:
                stack.enter_context(request.context())
                result = execute()
                if async_execution:
                    when_done(
                        result,
                        request.async_calls,
                        partial(finish_elsewhere, cell.set_value),
                        partial(finish_elsewhere, cell.set_error),
                    )
                    return
            except BaseException as error:
                finish(cell.set_error, error)
            else:
                finish(cell.set_value, result)

    def _begin(self, request: Request[Any]) -> Cell:
        """The cell for what `request` creates. The RRef's life here begins, unless it is over already."""
        message = request.message
        source = request.source.incarnation
        self._watch(source)
        found: list[Cell] = []

        def arrive(table: RRefTable) -> list[Action]:
            found.append(self._cells.setdefault(message.rref_id, Cell()))
            if message.fork_id == message.rref_id:  # remote() to this worker itself: `_create_here` counted it
                return []
            return table.creation_arrived(message.rref_id, message.fork_id, source)

        self._decide(arrive)
        return found[0] if found else Cell()

    def _finish(self, request: Request[Any], set_cell: Callable[[], None]) -> None:
        message = request.message
        set_cell()
        if message.fork_id == message.rref_id:
            self._decide(lambda table: table.finish_here(message.rref_id))
        request.reply()

    # ---- serving users ---------------------------------------------------------------------------------------------

    def serve_fetch(self, request: Request[RRefFetch]) -> Work | None:
        """Answer with the value, once it is set. No thread waits for it."""
        cell = self._cell_for(request, request.message.rref_id, request.message.fork_id)
        if cell is None:
            return None

        def answer() -> None:
            def work() -> None:
                value = cell.get()
                request.reply(pickling.dumps(value, keep_graph=cell.is_given and values.is_typed(value)))

            request.run(work)

        if cell.is_set():
            return answer
        cell.when_set(lambda: self.agent.submit(answer))
        return None

    def serve_backward(self, request: Request[RRefBackward]) -> None:
        """Run a backward pass from the value, once it is set."""
        message = request.message
        cell = self._cell_for(request, message.rref_id, message.fork_id)
        if cell is None:
            return

        def work() -> None:
            backward_from(self, cell.get(), message.context_id, message.retain_graph)
            request.reply()

        def run() -> None:
            request.run(work)

        cell.when_set(lambda: self.agent.submit(run))

    def serve_fork_request(self, request: Request[RRefForkRequest]) -> None:
        """Count a new user."""
        message, holder = request.message, request.source.incarnation
        self._watch(holder, message.rref_id.life)

        def arrive(table: RRefTable) -> list[Action]:
            table.fork_requested(message.rref_id, message.fork_id, holder)
            return []

        self._decide(arrive)
        request.reply()

    def serve_child_accept(self, request: Request[RRefChildAccept]) -> None:
        """A child of a fork here is counted."""
        fork_id = request.message.fork_id
        self._decide(lambda table: table.child_accepted(fork_id))
        request.reply()

    def serve_user_delete(self, request: Request[RRefUserDelete]) -> None:
        """A user is gone."""
        message = request.message
        self._decide(lambda table: table.user_deleted(message.rref_id, message.fork_id))
        request.reply()

    def on_peer_lost(self, peer: WorkerInfo, reason: str) -> None:
        """Everything that `peer` held or owned is gone."""
        del reason
        self._decide(lambda table: table.peer_lost(peer.incarnation))

    def _cell_for(self, request: Request[Any], rref_id: RRefId, fork_id: ForkId) -> Cell | None:
        """Where the value is or will be; None, and an answer that says why, if it is gone."""
        asker = request.source.incarnation
        self._watch(asker, rref_id.life)
        with self._lock:
            refused = self._closed or self._table.value_wanted(rref_id, fork_id, asker) is Availability.REFUSED
            cell = None if refused else self._cells.setdefault(rref_id, Cell())
        if cell is None:
            why = (
                f"its owner {self.agent.info} has shut down"
                if self._closed
                else f"its user {fork_id} was deleted before, or who handed it on died before the owner counted it"
            )
            request.fail(RRefError(f"The value of {rref_id} is gone: {why}"))
        return cell


def install(agent: Agent) -> None:
    """Make `agent` serve RRefs. To be called before it joins its group."""
    context = RRefContext(agent)
    agent.extensions[Ledger] = agent.extensions[RRefContext] = context
    agent.hooks.passengers = hook = ForkHook(context)
    agent.add_hook(hook)
    agent.handle(PythonRemote, context.serve_python_remote, inline=False)
    agent.handle(BuiltinRemote, context.serve_builtin_remote, inline=False)
    agent.handle(RRefFetch, context.serve_fetch, inline=True)
    agent.handle(RRefBackward, context.serve_backward, inline=True)
    agent.handle(RRefForkRequest, context.serve_fork_request, inline=True)
    agent.handle(RRefChildAccept, context.serve_child_accept, inline=True)
    agent.handle(RRefUserDelete, context.serve_user_delete, inline=True)
    agent.on_peer_lost(context.on_peer_lost)


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
    return context.create(to, lambda rref, fork: PythonRemote(rref, fork, async_execution), payload, timeout_s)


def remote_builtin(agent: Agent, to: WorkerInfo, op: str, payload: Payload, timeout_s: float | None) -> RRef[Any]:
    """As `remote_python`, for the torch operator `op` with the packed `(args, kwargs)`."""
    context: RRefContext = agent.extensions[RRefContext]
    return context.create(to, lambda rref, fork: BuiltinRemote(rref, fork, op), payload, timeout_s)
