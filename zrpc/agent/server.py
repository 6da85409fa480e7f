"""Requests in: who serves them, and their answers out.

Until the group is complete, requests are kept back (a peer that is done earlier may call already), and while this
worker prepares for devices of a newcomer. They keep their order: what comes while those kept back are served joins
them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zrpc import finalizers, protocol_errors
from zrpc.agent.event_loop import EventLoop
from zrpc.agent.gate import payload_nbytes
from zrpc.agent.pool import HandlerPool
from zrpc.agent.quickness import Quickness
from zrpc.agent.request import Answerer, AsyncCalls, Request, Traced
from zrpc.agent.running import Handler, run, run_all
from zrpc.errors import (
    AgentClosedError,
    CallCancelledError,
    ConnectionLostError,
    OverloadedError,
    PeerLostError,
    ProtocolError,
    ZrpcError,
)
from zrpc.transport.credit import COUNTED_MIN_NBYTES
from zrpc.wire.exceptions import dump_exception, remote_traceback
from zrpc.wire.messages import Cancel, Message, Reply
from zrpc.wire.observing import Look
from zrpc.wire.payload import Payload, seal

if TYPE_CHECKING:
    from zrpc.agent.gate import Gates
    from zrpc.agent.hooks import Hooks
    from zrpc.agent.peers import Peers
    from zrpc.agent.queue import Queue
    from zrpc.ids import Incarnation, WorkerInfo
    from zrpc.staging.stager import Staging
    from zrpc.transport.inbox import Inbox, Work
    from zrpc.wire.envelope import Envelope

log = logging.getLogger("zrpc")

_UNSENT = "the answer to %s was not sent: %s"

_UNREACHABLE = (PeerLostError, ConnectionLostError, AgentClosedError)
"""Where the connection to a broker broke, the caller knows, and does not wait for the answer."""

M = TypeVar("M", bound=Message)
Refuse = Callable[[Request[Any], ZrpcError], None]
"""Answers a request that is not begun, with the reason."""


class Server:
    """The serving half of an agent. Any thread may call it; the lock owns what changes.

    Args:
        num_threads: handler threads.
        hooks: see the requests and their answers.
        peers: who may ask, and the way to them.
        inbox: whose reader may be given work.
        gates: refuse answers to peers that do not read.
        refresh: looks for newcomers.
        staging: brings tensors to and from devices.
        send_soon: runs on another thread what sends tensors that are still on their way from a device.
        cancel_calls: cancels calls of this worker that a request has led to.
        queue: how many calls of users may wait for a handler thread.
    """

    def __init__(
        self, num_threads: int, hooks: Hooks, peers: Peers, inbox: Inbox, gates: Gates, refresh: Callable[[], None],
        staging: Staging, send_soon: Callable[[Callable[[], None]], None],
        cancel_calls: Callable[[list[int]], None], queue: Queue,
    ) -> None:  # fmt: skip
        self.hooks = hooks
        self.pool = HandlerPool(num_threads, "zrpc-handler")
        self._peers = peers
        self._inbox = inbox
        self._gates = gates
        self._refresh = refresh
        self.staging = staging
        self._send_soon = send_soon
        self.async_calls = AsyncCalls()
        self.event_loop = EventLoop(hooks)
        self.queue = queue
        self._cancel_calls = cancel_calls
        self._handlers: dict[type[Message], tuple[Handler, bool]] = {Cancel: (self._serve_cancel, True)}
        self._refusals: dict[type[Message], Refuse] = {}
        self._quickness = Quickness()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._requests: dict[tuple[Incarnation, int], Request[Any]] = {}  # an entry is taken out by one `dict.pop`
        self._is_awaited = False
        self._holds = 1  # why requests are kept back: how many reasons there are
        self._early: deque[tuple[Incarnation, Envelope]] | None = deque()
        self._serves_early = False
        self._on_look: Callable[[Incarnation, Envelope], None] | None = None
        self._answerer: Answerer = self

    @property
    def num_serving(self) -> int:
        """How many requests are not answered yet."""
        return len(self._requests)

    def is_serving(self, source: Incarnation, call_id: int) -> bool:
        """Whether that request is here, and not answered yet."""
        return (source, call_id) in self._requests

    def requests(self) -> list[Request[Any]]:
        """Those that are not answered yet, the oldest first. Any thread."""
        return list(self._requests.values())

    def observed_by(self, on_look: Callable[[Incarnation, Envelope], None]) -> None:
        """Have `on_look(life, envelope)` take what observers ask, on the thread that reads: it must not block."""
        self._on_look = on_look

    def trace(self, on_answer: Callable[[Request[Any], BaseException | None], None] | None) -> None:
        """From now on tell `on_answer` of the answer to each request that comes; None: tell nothing."""
        self._answerer = self if on_answer is None else Traced(self, on_answer)

    def callers(self) -> list[WorkerInfo]:
        """The workers whose requests are not answered yet."""
        return list({request.source.incarnation: request.source for request in self.requests()}.values())

    def handle(
        self, message_type: type[M], handler: Callable[[Request[M]], Work | None], inline: bool,
        refuse: Callable[[Request[M], ZrpcError], None] | None = None,
    ) -> None:  # fmt: skip
        """See `Agent.handle`."""
        self._handlers[message_type] = (handler, inline)
        if refuse is not None:
            self._refusals[message_type] = refuse

    def open(self) -> None:
        """Serve requests from now on, those kept back first, unless `hold` was called meanwhile."""
        with self._lock:
            self._holds -= 1
            if self._serves_early:
                return  # by another thread, which goes on
            self._serves_early = True
        while (kept := self._next_early()) is not None:
            source, envelope = kept
            member = self._peers.registry.by_incarnation(source)
            if member is None:
                self.pool.submit(partial(self._serve_stranger, source, envelope))
            else:
                self._submit(self._serve(member.info, envelope, is_reading=False))

    def hold(self) -> None:
        """Keep requests back that come from now on, until `open`. It must not be called while one is taken in."""
        with self._lock:
            self._holds += 1
            if self._early is None:
                self._early = deque()

    def _next_early(self) -> tuple[Incarnation, Envelope] | None:
        with self._lock:
            if self._early and not self._holds:
                return self._early.popleft()
            self._serves_early = False
            if not self._holds:
                self._early = None
            return None

    def wait(self, timeout_s: float) -> None:
        """Wait until the last request is answered, or somebody sees to it that none is, up to `timeout_s`."""
        with self._idle:
            self._is_awaited = True
            self._idle.wait(timeout_s)

    # ---- requests in -----------------------------------------------------------------------------------------------

    def serve(self, source: Incarnation, envelope: Envelope) -> Work | None:
        """Serve a request; see `zrpc.transport.inbox.Take`."""
        member = self._peers.registry.by_incarnation(source)
        if member is not None and self._early is None:
            return self._serve(member.info, envelope)
        if type(envelope.message) is Look:
            if self._on_look is not None:
                self._on_look(source, envelope)
            return None
        with self._lock:
            if self._early is not None:
                self._early.append((source, envelope))
                return None
        self.pool.submit(partial(self._serve_stranger, source, envelope))
        return None

    def _serve_stranger(self, source: Incarnation, envelope: Envelope) -> None:
        """A request of somebody not known here: a newcomer, or one who is gone."""
        if (reason := self._peers.registry.ended.get(source)) is not None:
            log.debug("a %s of a worker came late: %s", type(envelope.message).__name__, reason)
            return
        if self._peers.registry.by_incarnation(source) is None:
            self._refresh()
        member = self._peers.registry.by_incarnation(source)
        if member is None:
            log.warning("a %s of an unknown worker was dropped", type(envelope.message).__name__)
            return
        self._submit(self._serve(member.info, envelope, is_reading=False))

    def _serve(self, source: WorkerInfo, envelope: Envelope, *, is_reading: bool = True) -> Work | None:
        """Have a request served; `is_reading`: by the thread that has read it, and may be given the work."""
        request = Request(self._answerer, source, envelope, envelope.message)
        self._requests[request.key] = request
        handler, inline = self._handlers.get(type(envelope.message), (self._reject, True))
        work: Work | None = partial(run_all, handler, request)
        if inline and self._inbox.is_read_here and self._inbox.must_hand_on:
            self._inbox.hand_on(lambda: self._submit(run(handler, request)))
            return None
        if inline:
            work = run(handler, request)
        if work is None:
            return None
        if is_reading and self._inbox.can_work and self._quickness.expects_quick():
            if self.pool.around is not None:
                work = partial(self.pool.around, work)
            return partial(self._quickness.timed, work)
        if inline:
            self.pool.submit(work)
        elif (refusal := self.queue.enter(request, self._peers.me)) is None:
            self.pool.submit(partial(self._begin, request, work))
        else:
            self._refuse(request, refusal)
        return None

    def _begin(self, request: Request[Any], work: Work) -> None:
        """A handler thread comes to a request that waited for one."""
        if not self.queue.leave(request):
            return  # it was cancelled
        over = request.over()
        if over is None:
            work()
        else:
            self.queue.note_expired()
            self._refuse(request, over)

    # ---- what is not begun, or called off ---------------------------------------------------------------------------

    def _serve_cancel(self, request: Request[Cancel]) -> None:
        """The caller waits no longer for its call. Runs inline."""
        self._end(request)
        found = self._requests.get((request.source.incarnation, request.message.call_id))
        if found is not None and found.is_of_users:
            self.queue.note_cancelled()
            nested = found.cancel()
            if self.queue.leave(found):
                self._refuse(found, CallCancelledError("the call was cancelled before it began"))
            elif nested:
                self._cancel_calls(nested)

    def lose(self, caller: Incarnation) -> None:
        """That worker is gone: what waits here for it is dropped, and what runs for it is cancelled.

        But creations of RRefs that run: others may hold these, also such that their forks are not counted yet.
        On the control thread. There is no answer: it would reach nothing.
        """
        for request in self.requests():
            if request.source.incarnation != caller or not request.is_of_users:
                continue
            if self.queue.leave(request):
                self.queue.note_cancelled()
                request.let_go()
                self._end(request)
            elif type(request.message) not in self._refusals and not request.is_cancelled:
                self.queue.note_cancelled()
                self._cancel_calls(request.cancel())

    def _refuse(self, request: Request[Any], reason: ZrpcError) -> None:
        """Answer a request that is not begun. It must not block."""
        request.let_go()
        refuse = self._refusals.get(type(request.message))
        if refuse is None:
            request.fail(reason)
        else:
            refuse(request, reason)

    def _reject(self, request: Request[Any]) -> None:
        raise ProtocolError(f"{self._peers.me} does not serve {type(request.message).__name__}")

    def _submit(self, work: Work | None) -> None:
        if work is not None:
            self.pool.submit(work)

    # ---- answers out -----------------------------------------------------------------------------------------------

    def answer(self, request: Request[Message], payload: Payload | None, error: BaseException | None) -> None:
        """See `Answerer.answer`. A second answer to one request is a defect of its handler and raises."""
        with self._lock:
            if request.answered:
                raise ProtocolError(f"{type(request.message).__name__} from {request.source} was answered twice")
            request.answered = True
        if request.is_cancelled:  # nothing waits for what came of it
            payload, error = None, error or request.over()
        if type(error) is ProtocolError and remote_traceback(error) is None:  # else it was another worker's
            protocol_errors.received.note("request", str(request.source), error)
        sent = True
        try:
            sent = self._send(request, payload, error)
        except _UNREACHABLE as gone:
            finalizers.defer(partial(log.debug, _UNSENT, request.source, gone))
        except OverloadedError as full:
            finalizers.defer(partial(log.error, _UNSENT, request.source, full))
        finally:
            if sent:
                self._end(request)

    def _send(self, request: Request[Message], payload: Payload | None, error: BaseException | None) -> bool:
        """Send the answer, or one that says why it cannot be sent, without the hooks that may be the reason.

        Returns:
            False if a stager thread does so once tensors have come from their devices.
        """
        to = request.source
        try:
            message: Message = Reply()
            if error is not None:
                message, payload = dump_exception(error)
            extras = None
            if request.extras or (payload is not None and payload.passengers):
                payload = payload or Payload()
                extras = self.hooks.send(to, message, payload, request.extras or {})
                if payload.passengers and self.hooks.passengers is not None:
                    self.hooks.passengers.answering(to, request.call_id, self.hooks.announced(extras))
            envelope = seal(message, request.call_id, payload, extras, self._peers.routes(to).replies)
            is_large = payload_nbytes(envelope) > COUNTED_MIN_NBYTES
            if is_large and (waiting_nbytes := self._peers.queued_nbytes(to)):
                self._gates[to.incarnation].check_answer(waiting_nbytes, self._peers.me, to)
            if envelope.is_arriving:
                self._send_soon(partial(self._send_arriving, request, envelope, payload))
            else:
                if payload is not None and envelope.buffers:
                    payload.let_go()  # where nobody else sees that memory either, it may go along
                    envelope.is_last_use = True
                self._peers.send(to, envelope, may_lie=True)
                if payload is not None and payload.passengers:
                    payload.has_left()
        except _UNREACHABLE:
            raise
        except Exception as unsendable:
            failure, rebuilt_from = dump_exception(unsendable if error is None else error, attachments=False)
            self._peers.send(to, seal(failure, request.call_id, rebuilt_from, None))
            return True
        if payload is not None and payload.after is not None:
            payload.after()
        return not envelope.is_arriving

    def _send_arriving(self, request: Request[Message], envelope: Envelope, payload: Payload | None) -> None:
        """Send an answer as its tensors come from their devices. Runs on a stager thread."""
        to = request.source
        try:
            try:
                self._peers.send(to, envelope)
                if payload is not None:
                    payload.has_left()
            except _UNREACHABLE:
                raise
            except Exception as unsendable:
                failure, rebuilt_from = dump_exception(unsendable, attachments=False)
                self._peers.send(to, seal(failure, request.call_id, rebuilt_from, None))
        except _UNREACHABLE as gone:
            log.debug(_UNSENT, to, gone)
        finally:
            self._end(request)

    def _end(self, request: Request[Any]) -> None:
        """A request is answered, or never will be. Passengers that were not received, as it was not begun, are now."""
        if request.extras and self.hooks.announced(request.extras):
            self.pool.submit(partial(self.hooks.discard, request.extras))
        self._requests.pop(request.key, None)
        if self._is_awaited and not self._requests:
            with self._lock:
                self._idle.notify_all()
