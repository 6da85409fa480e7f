"""The agent: calls out, requests in, for one worker.

Callers send on their own threads, and read while they wait. Whoever reads takes messages in: answers complete calls,
requests go to the server (`zrpc.agent.server`). Completer threads complete the futures of asynchronous calls that
nobody waits for, and so run what users hang on them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import zrpc.agent.collection  # noqa: F401  # torch.futures.wait_all is to see our failures
from zrpc import finalizers
from zrpc.agent.call import Call
from zrpc.agent.calls import Calls
from zrpc.agent.completions import Completions
from zrpc.agent.execution import serve_builtin, serve_python
from zrpc.agent.gate import Gates, Standing, needed
from zrpc.agent.hooks import CallHook, Hooks
from zrpc.agent.peers import PeerRoutes, Peers
from zrpc.agent.pool import HandlerPool, blocking
from zrpc.agent.server import Server
from zrpc.config import RpcBackendOptions, check_timeout
from zrpc.control import ControlThread
from zrpc.errors import AgentClosedError, PeerLostError, ProtocolError, RpcTimeoutError, ZrpcError
from zrpc.exception_text import log_error
from zrpc.ids import IdGenerator, Incarnation, WorkerInfo
from zrpc.staging import handover
from zrpc.staging.cuda import CudaAccelerator
from zrpc.staging.stager import Staging
from zrpc.transport.carrier import Carrier
from zrpc.wire.exceptions import load_exception
from zrpc.wire.messages import BuiltinCall, Failure, Leave, Message, PythonCall, Reply
from zrpc.wire.payload import Payload, open_payload, seal

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.request import Request
    from zrpc.membership.group import Group, Member
    from zrpc.staging.accelerator import Accelerator
    from zrpc.staging.streams import Streams
    from zrpc.transport.endpoint import Endpoint
    from zrpc.transport.inbox import Work
    from zrpc.transport.shared_memory import SharedMemory
    from zrpc.transport.turns import Awaited
    from zrpc.wire.envelope import Envelope

log = logging.getLogger("zrpc")

M = TypeVar("M", bound=Message)

CONTROL_END_S = 1.0
"""So long, at least, a closing worker waits for its control thread, whose tasks do not wait for others."""
NOTIFY_TIMEOUT_S = 5.0
"""An idempotent notification that is not acknowledged within this time is sent again."""


class Agent:
    """One worker. Create it, `handle` what floors above serve, then `join`, then `open`.

    Args:
        options: what the user asked for.
        endpoint: the transport; the agent starts and closes it.
        group: the membership; the agent joins and leaves it.
        address: where others reach this worker; None with a broker.
        connect: tells the transport of a member's address (nothing, with a broker).
        disconnect: tells the transport that a member is gone for good.
        shared_memory: for large buffers between workers of one host; None: they go through the endpoint.
        open_accelerator: opens the devices, if any are used.
    """

    info: WorkerInfo
    ids: IdGenerator

    def __init__(
        self,
        options: RpcBackendOptions,
        endpoint: Endpoint,
        group: Group,
        address: str | None,
        connect: Callable[[Member], None],
        disconnect: Callable[[Incarnation], None],
        shared_memory: SharedMemory | None = None,
        open_accelerator: Callable[[], Accelerator] = CudaAccelerator,
    ) -> None:
        self.options = options
        self.address = address
        self.rpc_timeout_s = options.rpc_timeout
        self.extensions: dict[type, Any] = {}
        self.hooks = Hooks()
        self._carrier = Carrier(endpoint, shared_memory, lambda nbytes: self.staging.receive_memory(nbytes))
        self._group = group
        self._stagers = HandlerPool(1, "zrpc-stager")  # one more where all wait for devices
        self.staging = Staging(
            open_accelerator, options.pinned_pool_nbytes, self._stagers.submit, blocking, options.cuda_ipc,
            pin=lambda buffer: self._carrier.pin(buffer, self.staging), beside=self._carrier.beside,
            on_streams=self._run_on,
        )  # fmt: skip
        self.control = ControlThread(lambda: self._calls.expire_due())
        self._peers = Peers(
            self._carrier, self.staging, group, connect, disconnect, self._on_gone, self.control.submit,
            lambda: self._server.hold(), self.open,
        )  # fmt: skip
        self.members = self._peers.registry
        self.watched = self._peers.watched
        self._gates = Gates(options.max_in_flight_nbytes, options.max_in_flight_calls, self._peers.is_here)
        self._server = Server(
            options.num_worker_threads, self.hooks, self._peers, endpoint.inbox, self._gates, lambda: self.refresh(),
            self.staging, self._stagers.submit,
        )  # fmt: skip
        self._dropped = HandlerPool(1, "zrpc-finalizer")
        self._garbage: deque[list[Any]] = deque()
        self._takes_garbage = True
        self._lost_listeners: list[Callable[[WorkerInfo, str], None]] = []
        self._calls = Calls(self._gates, self._carrier.inbox.wake, self.discard, self.control.wake)
        self._call_ids = itertools.count(1)
        self._lock = threading.Lock()  # owns what follows
        self._closed = False
        self.lost_at: float | None = None  # when a peer was last lost, or left (`time.monotonic`)
        self.completions = Completions(lambda: self._carrier.inbox.is_read_by_caller)
        self.handle(PythonCall, serve_python, inline=False)
        self.handle(BuiltinCall, serve_builtin, inline=False)
        self.handle(Leave, self._serve_leave, inline=True)

    @property
    def is_static_group(self) -> bool:
        """Whether the group was complete at the start, and nobody comes or goes."""
        return self._peers.is_static

    # ---- life ------------------------------------------------------------------------------------------------------

    def join(self, name: str, rank: int, world_size: int | None, card: dict[str, Any], timeout_s: float) -> None:
        """Come into the group, as `Group.join`; requests are kept back until `open`."""
        self.control.start()
        self._carrier.start(self._on_envelope, self._peers.lose, self.completions.catch_up)
        me = self._peers.join(name, rank, world_size, card, timeout_s)
        self.info = me.info
        self.ids = IdGenerator(me.info.id, me.incarnation)

    def open(self) -> None:
        """Serve requests from now on, and those kept back."""
        self._server.open()

    def quiesce(self, timeout_s: float) -> bool:
        """Wait until no call is under way and no request served; False if `timeout_s` (0: no limit) was too short.
        Once a worker of a static group is lost, whose requests may never end, callers alone wait for theirs.
        """
        deadline = time.monotonic() + timeout_s if timeout_s else None
        while self._calls or (self._server.num_serving and (self.lost_at is None or not self.is_static_group)):
            left = 0.05 if deadline is None else min(0.05, deadline - time.monotonic())
            if left <= 0:
                return False
            self._server.wait(left)
        return True

    def say_goodbye(self, timeout_s: float) -> None:
        """Tell the peers of a dynamic group that this worker leaves; wait up to `timeout_s` for them to know.

        From then on a call of theirs to its name is for the next worker of that name. A broker tells of it too, but
        what workers of one host send each other may be quicker. In a static group nobody may come again.
        """
        if self.is_static_group or self._closed:
            return
        with suppress(Exception):  # the store may be gone
            self.refresh()
        others = [info for info in self.members.all() if info.incarnation != self.info.incarnation]
        for call in [self.request(info, Leave(), timeout_s=timeout_s) for info in others]:
            with suppress(ZrpcError):
                call.wait()

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        """Leave and stop; `at_exit`: see `Endpoint.close`. Calls under way end with `AgentClosedError`. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._gates.close(AgentClosedError("this worker shut down"))
        self._carrier.wind_down()
        self._server.pool.close(flush_s)
        self._stagers.close(flush_s)
        self._carrier.flush()
        self._group.leave(flush_s, at_exit=at_exit)  # after the last answers: a broker relays nothing for the gone
        self._carrier.close(flush_s, at_exit=at_exit)
        self._calls.close(lambda: AgentClosedError("this worker shut down while the call was under way"))
        self.completions.close(flush_s)
        self.staging.close(flush_s)
        self.control.close(max(flush_s, CONTROL_END_S))
        self._takes_garbage = False
        self._let_go()
        self._dropped.close(flush_s)
        if self.staging.streams is not None:
            handover.order_by(None)

    # ---- for the floors above --------------------------------------------------------------------------------------

    def handle(self, message_type: type[M], handler: Callable[[Request[M]], Work | None], *, inline: bool) -> None:
        """Serve requests of `message_type` with `handler`.

        Args:
            message_type: what it serves.
            handler: called once a request; it, or what it starts, answers. It may return further work.
            inline: run it on the reader that takes the message, in the order in which messages came (a caller that
                reads hands it on to one): it must not block. Else it runs as what it may return does: on a reader
                outside of the lock, or on a handler thread.
        """
        self._server.handle(message_type, handler, inline)

    def add_hook(self, hook: CallHook) -> None:
        """Let `hook` ride on every hooked call."""
        self.hooks.add(hook)

    def set_rpc_timeout(self, timeout_s: float) -> None:
        """The default time limit of calls is `timeout_s` from now on; 0: none.

        Raises:
            ConfigError: it is no number of seconds.
        """
        self.rpc_timeout_s = check_timeout(timeout_s, "rpc_timeout")

    def note_lost(self) -> None:
        """A peer is known to be lost, if only from another one."""
        self.lost_at = self.lost_at or time.monotonic()

    def on_peer_lost(self, listener: Callable[[WorkerInfo, str], None]) -> None:
        """Call `listener(worker, reason)` when a peer is gone, on the control thread: it must not wait."""
        self._lost_listeners.append(listener)

    def watch(self, to: WorkerInfo) -> None:
        """See to it that the listeners of `on_peer_lost` hear of the loss of `to` even if it is never called."""
        self._peers.watch(to)

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` soon on a handler thread."""
        self._server.pool.submit(task)

    def drop(self, garbage: list[Any]) -> None:
        """Let go of values soon, on a thread of their own: their `__del__` is user code. The caller keeps none."""
        if self._takes_garbage:
            self._garbage.append(garbage)
            finalizers.defer(self._let_go)

    def _let_go(self) -> None:
        """Let go of all that was dropped by now; later tasks of a round of the control thread find nothing."""
        garbage: list[list[Any]] = []
        while self._garbage:
            garbage.append(self._garbage.popleft())
        if garbage:
            self._dropped.submit(garbage.clear)

    def memory_card(self) -> list[Any] | None:
        """What the membership card says of this worker's shared memory."""
        return self._carrier.card()

    def resolve(self, to: str | int | WorkerInfo) -> WorkerInfo:
        """The worker that `to` names; in a dynamic group newcomers are looked for.

        Raises:
            UnknownWorkerError: there is none.
            RendezvousError: it is not known here, and the store of a dynamic group is unreachable.
            ValueError: `to` is none of the three.
        """
        return self._peers.resolve(to)

    def resolve_life(self, rank: int, incarnation: Incarnation) -> WorkerInfo:
        """That life of the worker of that rank; in a dynamic group newcomers are looked for.

        Raises:
            PeerLostError: it is not in the group, or not any more.
            RendezvousError: as `resolve`.
        """
        return self._peers.resolve_life(rank, incarnation)

    def routes(self, to: WorkerInfo) -> PeerRoutes:
        """Where tensors arrive that are sent to `to`."""
        return self._peers.routes(to)

    def refresh(self) -> None:
        """Look for newcomers to a dynamic group."""
        self._group.refresh()

    def request(
        self, to: WorkerInfo, message: Message, payload: Payload | None = None, *, timeout_s: float | None = None,
        hooked: bool = False, waited: bool = False, goes_back: bool = False,
    ) -> Call:  # fmt: skip
        """Send a request. What goes wrong on the way is the call's outcome; only an unsendable payload raises here.

        A hooked request waits for room in the window of its peer (`zrpc.agent.window`), unless this thread may not.
        Call it in a section of `zrpc.interrupts`.

        Args:
            to: the callee.
            message: what is asked.
            payload: what rides beside it; its memory must not be written to until the call is done.
            timeout_s: time limit in seconds; 0: none; None: the default.
            hooked: let the hooks see it.
            waited: the caller calls `wait` at once on this very thread, which then keeps the time limit.
            goes_back: tensors of the payload go where those of an answer would, by the device map of the callee.

        Raises:
            SerializationError: a tensor of the payload cannot travel.
            DeviceError: one cannot be brought here from its device.
        """
        limit_s = self.rpc_timeout_s if timeout_s is None else check_timeout(timeout_s, "timeout")
        extras = None
        if hooked and self.hooks:
            payload = payload or Payload()
            extras = self.hooks.send(to, message, payload, None)
        call_id = next(self._call_ids)
        routes = self._peers.routes(to)
        route = routes.replies if goes_back else routes.requests
        envelope = seal(message, call_id, payload, extras, route)
        gate = self._gates[to.incarnation]
        call = Call(self, call_id, to, gate, message, limit_s, waited)
        try:
            left_s = gate.enter(call_id, envelope, to, limit_s, self._standing if hooked else needed)
        except ZrpcError as error:
            call.complete(None, error)
            return call
        try:
            self._calls.add(call)
            if envelope.is_arriving and not waited:
                self._stagers.submit(partial(self._send_arriving, call, envelope, payload))
            elif not self._send(call, envelope, payload):
                return call
            if payload is not None and payload.after is not None:
                payload.after()
            if not waited:
                self._carrier.inbox.num_sent += 1
                if limit_s:
                    self._calls.limit(call_id, left_s)
        except BaseException as interrupt:  # Ctrl-C: nobody will wait for it, and nothing would end it
            self._calls.fail(call_id, interrupt)
            raise
        if self._closed:  # the sweep of close() may have passed by
            self._calls.fail(call_id, AgentClosedError("this worker has shut down"))
        return call

    def _send(self, call: Call, envelope: Envelope, payload: Payload | None) -> bool:
        """Send a request; false: the call has ended."""
        if call.done():  # its time is over, or its peer is lost
            return False
        try:
            self._peers.send(call.peer, envelope)
        except Exception as error:
            self._calls.fail(call.call_id, error)
            return False
        if payload is not None and payload.passengers:
            payload.has_left()
        return True

    def _send_arriving(self, call: Call, envelope: Envelope, payload: Payload | None) -> None:
        """The same on a stager thread, as its tensors come from their devices."""
        self._send(call, envelope, payload)

    def notify(
        self, to: WorkerInfo, message: Message, on_done: Callable[[BaseException | None], None] = lambda _: None, *,
        inline: bool = True,
    ) -> None:  # fmt: skip
        """Send an idempotent message until it is acknowledged, the peer is lost or this worker closes.

        Args:
            to: the peer.
            message: what is told.
            on_done: called once, with what went wrong or None. It must not block.
            inline: that all went well may be noted by the thread that reads: `on_done` only counts. To hand each
                acknowledgement on takes as long as a call.

        Raises:
            ProtocolError: the message is not idempotent.
        """
        if not message.IDEMPOTENT:
            raise ProtocolError(f"{type(message).__name__} is not idempotent: it must not be sent twice")

        def settle(call: Call) -> None:
            if issubclass(type(call.error), RpcTimeoutError) and not self._closed:
                self.control.submit(lambda: self.notify(to, message, on_done, inline=inline))
            else:
                on_done(call.error)

        def note(call: Call) -> None:
            if not call.failed:
                on_done(None)
            elif call.is_unopened:  # it came as a pickle
                self.completions.submit(partial(settle, call))
            else:
                settle(call)

        self.request(to, message, timeout_s=NOTIFY_TIMEOUT_S).add_done_callback(
            note if inline else settle, inline=inline
        )

    def counts(self) -> dict[str, int]:
        """Calls under way, requests being served, handler threads and idle ones."""
        threads, idle = self._server.pool.counts()
        return {
            "client_active_calls": len(self._calls), "server_active_calls": self._server.num_serving,
            "server_active_async_calls": self._server.async_calls.num,
            "thread_pool_size": threads, "num_idle_threads": idle,
        }  # fmt: skip

    # ---- for calls and requests ------------------------------------------------------------------------------------

    def abandon(self, call_id: int) -> bool:
        """See `CallOwner.abandon`."""
        return self._calls.abandon(call_id)

    def discard(self, answer: Envelope) -> None:
        """An answer came that no thread asks for any more: its passengers are let go. See `CallOwner.discard`."""
        if answer.extras and self.hooks.passengers is not None:
            self.submit(partial(self.hooks.discard_answer, answer.extras))

    def wait_for(self, wanted: Awaited, deadline: float | None) -> None:
        """See `Inbox.wait_for`."""
        self._carrier.inbox.wait_for(wanted, deadline)

    def wake(self, wanted: Awaited) -> None:
        """See `Inbox.wake`."""
        self._carrier.inbox.wake(wanted)

    def open_answer(self, call: Call, envelope: Envelope) -> Payload:
        """See `CallOwner.open_answer`."""
        payload = open_payload(envelope, self.staging)
        self.hooks.receive_answer(call.peer, envelope.extras, payload)
        if isinstance(envelope.message, Failure):
            raise load_exception(call.peer, envelope.message, payload)
        return payload

    # ---- messages in -----------------------------------------------------------------------------------------------

    def _on_envelope(self, source: Incarnation, envelope: Envelope) -> Work | None:
        if isinstance(envelope.message, Reply | Failure):
            work = self._calls.finish(envelope.call_id, envelope, None)
            if work is None or self._carrier.inbox.can_work:
                return work
            self.completions.submit(work)
            return None
        return self._server.serve(source, envelope)

    def _standing(self) -> Standing:
        """How this thread stands to waiting for room."""
        inbox = self._carrier.inbox
        if inbox.is_read_here or self.completions.is_here():
            return Standing.NEEDED
        return Standing.SERVING if inbox.is_reader_here or self._server.pool.is_here() else Standing.FREE

    def _serve_leave(self, request: Request[Leave]) -> None:
        request.reply()
        self._peers.says_goodbye(request.source)

    def _run_on(self, streams: Streams | None) -> None:
        """This worker uses devices from now on: tasks run on streams of their own, and values are marked."""
        around = None if streams is None else streams.run
        self._server.pool.run_with(around)
        self.completions.run_with(around)
        handover.order_by(streams)

    def _on_gone(self, worker: WorkerInfo, reason: str) -> None:
        """A peer left or is lost: its calls fail. Runs on the control thread."""
        if self._closed:
            return
        self.lost_at = time.monotonic()
        self._gates.drop(worker.incarnation, PeerLostError(f"{worker} is lost: {reason}"))
        text = f"{worker} is lost: {reason}. It is not known whether the call ran there"
        self._calls.lose(worker.incarnation, lambda: PeerLostError(text))
        for listener in self._lost_listeners:
            try:
                listener(worker, reason)
            except Exception as error:  # the others are to know all the same
                log_error(log, "what follows from the loss of %s was not done", worker, error=error)
