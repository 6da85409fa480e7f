"""The agent: one worker, from its parts. Calls out are `zrpc.agent.client`, requests in `zrpc.agent.server`."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import zrpc.agent.collection  # noqa: F401  # torch.futures.wait_all is to see our failures
from zrpc import protocol_errors
from zrpc.agent.client import Client
from zrpc.agent.execution import serve_builtin, serve_python
from zrpc.agent.garbage import Garbage
from zrpc.agent.gate import Gates
from zrpc.agent.hooks import CallHook, Hooks
from zrpc.agent.observed import Observed
from zrpc.agent.outage import Outage
from zrpc.agent.peers import PeerRoutes, Peers
from zrpc.agent.pool import HandlerPool, blocking
from zrpc.agent.queue import Queue
from zrpc.agent.server import Server
from zrpc.agent.suspicion import Suspicions
from zrpc.agent.under_way import describe
from zrpc.config import check_timeout
from zrpc.control import ControlThread
from zrpc.errors import ZrpcError
from zrpc.exception_text import log_error
from zrpc.ids import IdGenerator, Incarnation, WorkerInfo
from zrpc.staging import handover
from zrpc.staging.cuda import CudaAccelerator
from zrpc.staging.stager import Staging
from zrpc.transport.carrier import Carrier
from zrpc.wire.messages import BuiltinCall, Heartbeat, Leave, Message, PythonCall

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.request import Request
    from zrpc.config import RpcBackendOptions
    from zrpc.membership.group import Group, Member
    from zrpc.staging.accelerator import Accelerator
    from zrpc.staging.streams import Streams
    from zrpc.transport.endpoint import Endpoint
    from zrpc.transport.inbox import Work
    from zrpc.transport.shared_memory import SharedMemory
    from zrpc.transport.turns import Awaited
    from zrpc.wire.region import SharedBuffers

log = logging.getLogger("zrpc")

M = TypeVar("M", bound=Message)

REPORT_S = 5.0  # how often the log says what a shutdown waits for
CONTROL_END_S = 1.0  # so long, at least, a closing worker waits for its control thread, whose tasks do not wait


class Agent:
    """One worker. Create it, `handle` what floors above serve, then `join`, then `open`.

    Args:
        options: what the user asked for.
        endpoint: the transport; the agent starts and closes it.
        group: the membership; the agent joins and leaves it.
        address: where others reach this worker; None with a broker.
        connect, disconnect: tell the transport of a member's address, and that it is gone (nothing, with a broker).
        shared_memory: for large buffers between workers of one host; None: they go through the endpoint.
        open_accelerator: opens the devices, if any are used.
        checks_answers: an answer ends a call only if it is of the worker that was called.

    Attributes:
        request: see `Client.request`: it is this very method, as each call takes it.
        notify, completions: see `Client`.
        observed: this worker as observers see it.
        event_loop: where `async def` functions run.
        outage: is told when the connection to a broker is gone, and when there is one again.
        drop, wake: see `Garbage.drop` and `Inbox.wake`.
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
        *,
        checks_answers: bool = False,
    ) -> None:
        self.options = options
        self._checks_answers = checks_answers
        self.address = address
        self.extensions: dict[type, Any] = {}
        self.hooks = Hooks()
        self._carrier = Carrier(endpoint, shared_memory, lambda nbytes: self.staging.receive_memory(nbytes))
        self._group = group
        self._stagers = HandlerPool(1, "zrpc-stager")  # one more where all wait for devices
        self.staging = Staging(
            open_accelerator, options.pinned_pool_nbytes, self._stagers.submit, blocking,
            pin=lambda buffer: self._carrier.pin(buffer, self.staging), on_streams=self._run_on,
        )  # fmt: skip
        self.control = ControlThread(self._run_timers)
        self._peers = Peers(
            self._carrier, self.staging, group, connect, disconnect, self._on_gone, self.control.submit,
            lambda: self._server.hold(), self.open,
        )  # fmt: skip
        self.members = self._peers.registry
        self._by_name = self.members.named
        self.watched = self._peers.watched
        self._gates = Gates(options.max_in_flight_nbytes, options.max_in_flight_calls, self._peers.is_here)
        self._server = Server(
            options.num_worker_threads, self.hooks, self._peers, endpoint.inbox, self._gates, lambda: self.refresh(),
            self.staging, self._stagers.submit, lambda call_ids: self._client.cancel(call_ids),
            Queue(options.max_queued_calls, refuses=options.overload == "refuse"),
        )  # fmt: skip
        self._garbage = Garbage()
        self.drop = self._garbage.drop
        self.wake = endpoint.inbox.wake
        self._lost_listeners: list[Callable[[WorkerInfo, str], None]] = []
        self._client = Client(
            options.rpc_timeout, self.hooks, self._peers, endpoint.inbox, self._gates, self.staging, self.control,
            self._stagers.submit, self._server.pool.submit, self._server.pool.is_here, self._server.serve,
            self._server.event_loop.is_here, propagates=options.propagate_deadlines,
        )  # fmt: skip
        self._suspicions = Suspicions(
            options.liveness_timeout, self._gates, self._peers, self._client, self.control.submit, self._server.callers
        )
        self.completions = self._client.completions
        self.event_loop = self._server.event_loop
        self.observed = Observed(
            endpoint, self._carrier, self._peers, self._client, self._server, self._gates, self.control
        )
        self.outage = Outage(self.control, self._carrier, self._client)
        self.request = self._client.request
        self.notify = self._client.notify
        self._lock = threading.Lock()  # owns what follows
        self._closed = False
        self.lost_at: float | None = None  # when a peer was last lost, or left (`time.monotonic`)
        self.handle(PythonCall, serve_python, inline=False)
        self.handle(BuiltinCall, serve_builtin, inline=False)
        self.handle(Leave, self._serve_leave, inline=True)
        self.handle(Heartbeat, lambda request: request.reply(), inline=True)

    @property
    def is_static_group(self) -> bool:
        """Whether the group was complete at the start, and nobody comes or goes."""
        return self._peers.is_static

    # ---- life ------------------------------------------------------------------------------------------------------

    def join(self, name: str, rank: int, world_size: int | None, card: dict[str, Any], timeout_s: float) -> None:
        """Come into the group, as `Group.join`; requests are kept back until `open`."""
        self.control.start()
        on_envelope = self._client.on_checked_envelope if self._checks_answers else self._client.on_envelope
        self._carrier.start(on_envelope, self._peers.lose, self.completions.catch_up)
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
        began = time.monotonic()
        deadline, report_at = began + timeout_s if timeout_s else None, began + REPORT_S
        while self._client.calls or (self._server.num_serving and (self.lost_at is None or not self.is_static_group)):
            if time.monotonic() >= report_at:
                report_at += REPORT_S
                log.warning("%s shuts down, and waits for %s", self.info, self.describe_waits())
            left = 0.05 if deadline is None else min(0.05, deadline - time.monotonic())
            if left <= 0:
                return False
            self._server.wait(left)
        return True

    def describe_waits(self) -> str:
        """What is under way: the calls out, and those that run here."""
        return describe(self._client.calls.all(), self._server.requests())

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
        self._client.wind_down()
        self._carrier.wind_down()
        self._server.pool.close(flush_s)
        self._server.event_loop.close(flush_s)
        self._stagers.close(flush_s)
        self._carrier.flush()
        self._group.leave(flush_s, at_exit=at_exit)  # after the last answers: a broker relays nothing for the gone
        self._carrier.close(flush_s, at_exit=at_exit)
        self._client.close(flush_s)
        self.staging.drain()
        self.control.close(max(flush_s, CONTROL_END_S))
        self._garbage.close(flush_s)
        if self.staging.streams is not None:
            handover.order_by(None)

    # ---- for the floors above --------------------------------------------------------------------------------------

    def handle(
        self, message_type: type[M], handler: Callable[[Request[M]], Work | None], *, inline: bool,
        refuse: Callable[[Request[M], ZrpcError], None] | None = None,
    ) -> None:  # fmt: skip
        """Serve requests of `message_type` with `handler`.

        Args:
            handler: called once a request; it, or what it starts, answers. It may return further work.
            inline: run it on the reader that takes the message, in the order in which messages came (a caller that
                reads hands it on to one): it must not block. Else it runs as what it may return does: on a reader
                outside of the lock, or on a handler thread.
            refuse: called instead, with the reason, for a call that is not begun because it was cancelled, its time is
                over or too many wait. It answers, and must not block. None: the reason is the answer.
        """
        self._server.handle(message_type, handler, inline, refuse)

    def add_hook(self, hook: CallHook) -> None:
        """Let `hook` ride on every hooked call."""
        self.hooks.add(hook)

    @property
    def rpc_timeout_s(self) -> float:
        """The default time limit of calls, in seconds; 0: none."""
        return self._client.timeout_s

    def set_rpc_timeout(self, timeout_s: float) -> None:
        """The default time limit of calls is `timeout_s` from now on; 0: none.

        Raises:
            ConfigError: it is no number of seconds.
        """
        self._client.set_timeout(timeout_s)

    def note_draining(self, life: Incarnation) -> None:
        """That worker takes no new calls from now on."""
        self._peers.note_draining(life)

    def note_lost(self) -> None:
        """A peer is known to be lost, if only from another one."""
        self.lost_at = self.lost_at or time.monotonic()

    def on_peer_lost(self, listener: Callable[[WorkerInfo, str], None]) -> None:
        """Call `listener(worker, reason)` when a peer is gone, on the control thread: it must not wait."""
        self._lost_listeners.append(listener)

    def watch(self, to: WorkerInfo) -> None:
        """See to it that the listeners of `on_peer_lost` hear of the loss of `to` even if it is never called."""
        self._peers.watch(to)

    def watch_life(self, life: Incarnation) -> None:
        """The same of a life that may not be known here: it joined a moment ago, or it came and died meanwhile.

        It is looked for. If it is not in the group, the listeners are told that it is over: nothing will come of it.
        """
        member = self.members.by_incarnation(life)
        if member is not None:
            self._peers.watch(member.info)
        elif not self.is_static_group:
            self.submit(partial(self._look_for, life))

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` soon on a handler thread."""
        self._server.pool.submit(task)

    def resolve(self, to: str | int | WorkerInfo, wait_s: float | None = 0.0) -> WorkerInfo:
        """The worker that `to` names; in a dynamic group newcomers are looked for.

        Args:
            to: name, rank or info.
            wait_s: for how many seconds to wait for one where there is none; None: as the options say.

        Raises:
            UnknownWorkerError: there is none.
            DrainingError: it takes no new calls.
            RendezvousError: it is not known here, and the store of a dynamic group is unreachable.
            ValueError: `to` is none of the three.
        """
        known = self._by_name(to) if type(to) is str else None
        if known is not None and not self._peers.draining:
            return known.info
        if wait_s is None:
            wait_s = self.options.wait_for_worker
        if wait_s and self._client.may_wait():
            return self._peers.resolve_in_time(to, check_timeout(wait_s, "wait_for_worker", "do not wait"))
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

    def counts(self) -> dict[str, int]:
        """Calls under way, requests being served, handler threads and idle ones, and messages that were damaged."""
        threads, idle = self._server.pool.counts()
        queue = self._server.queue
        return {
            "client_active_calls": len(self._client.calls), "server_active_calls": self._server.num_serving,
            "server_active_async_calls": self._server.async_calls.num,
            "server_queued_calls": len(queue), "server_refused_calls": queue.num_refused,
            "server_over_limit_calls": queue.num_over_limit, "server_cancelled_calls": queue.num_cancelled,
            "server_expired_calls": queue.num_expired,
            "thread_pool_size": threads, "num_idle_threads": idle,
            "protocol_errors": sum(protocol_errors.received.counts().values()),
        }  # fmt: skip

    def end_sharing(self, shared: SharedBuffers) -> None:
        """See `Carrier.end_sharing`."""
        self._carrier.end_sharing(shared)

    def wait_for(self, wanted: Awaited, deadline: float | None) -> None:
        """See `Inbox.wait_for`."""
        self._carrier.inbox.wait_for(wanted, deadline)

    # ---- below -----------------------------------------------------------------------------------------------------

    def _look_for(self, life: Incarnation) -> None:
        """See `watch_life`. On a handler thread: the store may let it wait."""
        if life not in self.members.ended:
            with suppress(ZrpcError):  # nothing can be found out: what it sends would not be taken in either
                self.refresh()
        member = self.members.by_incarnation(life)
        if member is not None:
            self._peers.watch(member.info)
            return
        reason = "it is not in the group, or not any more"
        self.members.end(life, reason, keep=False)
        reason = self.members.ended.get(life, reason)
        self.control.submit(partial(self._on_gone, WorkerInfo("unknown", 0, life), reason))

    def _serve_leave(self, request: Request[Leave]) -> None:
        request.reply()
        self._peers.says_goodbye(request.source)

    def _run_timers(self) -> float:
        """Do what is due; after how many seconds more will be. Runs on the control thread."""
        expire_s, due_s = self._client.calls.expire_due(), min(self._carrier.trim(), self.observed.run_due())
        look_s = due_s if self._closed else self._suspicions.look()
        return min(due_s, look_s) if expire_s is None else min(expire_s, due_s, look_s)

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
        self._suspicions.lose(worker)
        self._client.lose(worker, reason)
        self._server.lose(worker.incarnation)
        for listener in self._lost_listeners:
            try:
                listener(worker, reason)
            except Exception as error:  # the others are to know all the same
                log_error(log, "what follows from the loss of %s was not done", worker, error=error)
