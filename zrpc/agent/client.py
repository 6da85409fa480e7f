"""Calls out: how requests are sent, and what becomes of their answers.

Callers send on their own threads, and read while they wait. Whoever reads hands answers to `on_envelope`, which
completes their calls. Completer threads complete the futures of asynchronous calls that nobody waits for, and so run
what users hang on them.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import suppress
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from zrpc import finalizers, interrupts, protocol_errors
from zrpc.agent.call import Call
from zrpc.agent.calls import Calls
from zrpc.agent.completions import Completions
from zrpc.agent.gate import Standing, needed
from zrpc.agent.served import serving
from zrpc.config import check_timeout
from zrpc.errors import (
    AgentClosedError,
    ConnectionLostError,
    NotConnectedError,
    OverloadedError,
    PeerLostError,
    ProtocolError,
    RpcTimeoutError,
    ZrpcError,
)
from zrpc.wire.envelope import Envelope
from zrpc.wire.exceptions import load_exception
from zrpc.wire.messages import Cancel, Failure, Message, Reply
from zrpc.wire.payload import Payload, open_payload, seal

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.gate import Gates
    from zrpc.agent.hooks import Hooks
    from zrpc.agent.peers import Peers
    from zrpc.control import ControlThread
    from zrpc.ids import Incarnation, WorkerInfo
    from zrpc.staging.stager import Staging
    from zrpc.transport.inbox import Inbox, Work
    from zrpc.transport.turns import Awaited

    Submit = Callable[[Callable[[], None]], None]

log = logging.getLogger("zrpc")

_LEFT_NOTHING = PeerLostError, AgentClosedError, OverloadedError, NotConnectedError
NOTIFY_TIMEOUT_S = 5.0
"""An idempotent notification that is not acknowledged within this time is sent again."""


class Client:
    """The calling half of an agent. Any thread may call it.

    Args:
        timeout_s: the default time limit of calls, in seconds; 0: none.
        hooks: see the requests and their answers.
        peers: the way to the callees.
        inbox: is read by callers that wait.
        gates: where calls wait for room.
        staging: brings tensors to and from devices.
        control: repeats what was not acknowledged.
        send_soon: runs on another thread what sends tensors that are still on their way from a device.
        submit: runs a task on a handler thread.
        is_handler: whether this thread is one of the handlers.
        on_request: is given what is no answer; see `zrpc.transport.carrier`.
        is_loop: whether this thread runs an event loop of this worker: it must not wait.
        propagates: whether callees are told of the time limits of calls, and when they are over.

    Attributes:
        timeout_s: see above.
        calls: those under way.
        completions: completes the futures of asynchronous calls.
    """

    def __init__(
        self, timeout_s: float, hooks: Hooks, peers: Peers, inbox: Inbox, gates: Gates, staging: Staging,
        control: ControlThread, send_soon: Submit, submit: Submit, is_handler: Callable[[], bool],
        on_request: Callable[[Incarnation, Envelope], Work | None], is_loop: Callable[[], bool] = lambda: False, *,
        propagates: bool = True,
    ) -> None:  # fmt: skip
        self.timeout_s = timeout_s
        self.calls = Calls(gates, inbox.wake, self.discard, control.wake)
        self.completions = Completions(lambda: inbox.is_read_by_caller)
        self._hooks = hooks
        self._peers = peers
        self._inbox = inbox
        self._gates = gates
        self._staging = staging
        self._control = control
        self._send_soon = send_soon
        self._submit = submit
        self._is_handler = is_handler
        self._on_request = on_request
        self._is_loop = is_loop
        self._propagates = propagates
        self._call_ids = itertools.count(1)
        self._held: dict[int, tuple[Call, Envelope, Payload | None]] = {}  # by call id; there was no broker
        self._closed = False

    @property
    def num_made(self) -> int:
        """How many requests were made so far; the counter of their numbers says so."""
        return int(repr(self._call_ids)[len("count(") : -1]) - 1

    def set_timeout(self, timeout_s: float) -> None:
        """See `Agent.set_rpc_timeout`."""
        self.timeout_s = check_timeout(timeout_s, "rpc_timeout")

    def request(
        self, to: WorkerInfo, message: Message, payload: Payload | None = None, *, timeout_s: float | None = None,
        hooked: bool = False, waited: bool = False, goes_back: bool = False, function: str | None = None,
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
            function: the name of what the callee is to run, for people.

        Raises:
            SerializationError: a tensor of the payload cannot travel.
            DeviceError: one cannot be brought here from its device.
        """
        limit_s = self.timeout_s if timeout_s is None else check_timeout(timeout_s, "timeout")
        extras = parent = None
        if hooked:
            parent = serving.get()
            if parent is not None:
                limit_s = parent.limit_s(limit_s)
        if hooked and self._hooks:
            payload = payload or Payload()
            extras = self._hooks.send(to, message, payload, None)
        call_id = next(self._call_ids)
        routes = self._peers.routes(to)
        route = routes.replies if goes_back else routes.requests
        envelope = seal(message, call_id, payload, extras, route)
        gate = self._gates[to.incarnation]
        announced = None if extras is None else self._hooks.announced(extras)
        call = Call(self, call_id, to, gate, message, limit_s, waited, hooked, announced, function)
        if parent is not None and (over := parent.over()) is not None:
            call.complete(None, over)
            return call
        try:
            left_s = gate.enter(call_id, envelope, to, limit_s, self._standing if hooked else needed)
        except ZrpcError as error:
            call.complete(None, error)
            return call
        if hooked:
            envelope.time_left_ms = ceil(left_s * 1000) if self._propagates else 0
        try:
            self.calls.add(call)
            if parent is not None:
                parent.add_nested(call_id, self.calls.is_under_way)
                if parent.is_cancelled:  # who cancelled it may not have seen this one
                    call.cancel()
            if envelope.is_arriving and not waited:
                self._send_soon(partial(self._send_arriving, call, envelope, payload))
            elif not self._send(call, envelope, payload):
                return call
            if payload is not None and payload.after is not None:
                payload.after()
            if not waited:
                self._inbox.num_sent += 1
                if limit_s:
                    self.calls.limit(call_id, left_s)
        except BaseException as interrupt:  # Ctrl-C: nobody will wait for it, and nothing would end it
            if hooked and self.calls.is_under_way(call_id):
                self.call_off(call, is_expired=False)
            self.calls.fail(call_id, interrupt)
            raise
        if self._closed:  # the sweep of close() may have passed by
            self.calls.fail(call_id, AgentClosedError("this worker has shut down"))
        return call

    def _send(self, call: Call, envelope: Envelope, payload: Payload | None) -> bool:
        """Send a request; false: the call has ended."""
        if call.done():  # its time is over, or its peer is lost
            return False
        try:
            self._peers.send(call.peer, envelope)
        except NotConnectedError as error:
            return self._hold(call, envelope, payload, error)
        except Exception as error:
            self.calls.fail(call.call_id, error)
            return False
        if payload is not None and payload.passengers:
            payload.has_left()
        return True

    def _hold(self, call: Call, envelope: Envelope, payload: Payload | None, error: NotConnectedError) -> bool:
        """Keep a request that could not be sent as there is no broker now, up to its time limit."""
        if envelope.is_arriving:  # what comes from a device is read once
            self.calls.fail(call.call_id, error)
            return False
        self._held[call.call_id] = call, envelope, payload
        self._control.submit(self.resend_held)  # there may be one again by now
        return True

    def resend_held(self) -> None:
        """Send the requests that were kept, as far as that is possible now. On the control thread."""
        for call_id in list(self._held):
            held = self._held.pop(call_id, None)  # first: one whose time is over now may leave, and is not said not to
            if held is None or held[0].done():
                continue
            call, envelope, payload = held
            try:
                self._peers.send(call.peer, envelope)
            except NotConnectedError:
                self._held[call_id] = held
                continue
            except Exception as error:
                self.calls.fail(call_id, error)
                continue
            if payload is not None and payload.passengers:
                payload.has_left()

    def break_off(self, peers: frozenset[Incarnation], reason: str) -> None:
        """What was on its way to and from these peers may be lost: their calls fail, but for those that are kept."""
        text = f"{reason}. It is not known whether the call ran"
        for peer in peers:
            self.calls.lose(peer, lambda: ConnectionLostError(text), self._held)
            if (gate := self._gates.get(peer)) is not None:
                gate.leave_but(self.calls.is_under_way)

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
            if issubclass(type(call.error), RpcTimeoutError | ConnectionLostError) and not self._closed:
                self._control.submit(lambda: self.notify(to, message, on_done, inline=inline))
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

    def lose(self, worker: WorkerInfo, reason: str) -> None:
        """`worker` is gone: its calls fail."""
        self._gates.drop(worker.incarnation, PeerLostError(f"{worker} is lost: {reason}"))
        unsent = f"{worker} is lost: {reason}. The call was not sent"
        for call_id, (call, _, _) in list(self._held.items()):
            if call.peer.incarnation == worker.incarnation and self._held.pop(call_id, None) is not None:
                self.calls.fail(call_id, PeerLostError(unsent))
        text = f"{worker} is lost: {reason}. It is not known whether the call ran there"
        self.calls.lose(worker.incarnation, lambda: PeerLostError(text))

    def wind_down(self) -> None:
        """This worker shuts down: calls do not wait for room any more, and later ones fail."""
        self._closed = True
        self._gates.close(AgentClosedError("this worker shut down"))

    def close(self, timeout_s: float) -> None:
        """End the calls under way; wait up to `timeout_s` for the completer threads. Idempotent."""
        self.calls.close(lambda: AgentClosedError("this worker shut down while the call was under way"))
        self._held.clear()
        self.completions.close(timeout_s)

    # ---- for calls -------------------------------------------------------------------------------------------------

    def abandon(self, call_id: int) -> bool:
        """See `CallOwner.abandon`."""
        return self.calls.abandon(call_id)

    def cancel(self, call_ids: list[int]) -> None:
        """Cancel those of these calls that are under way, and can be."""
        for call_id in call_ids:
            self.calls.cancel(call_id)

    def call_off(self, call: Call, *, is_expired: bool) -> None:
        """Tell the callee, as far as that is possible now; see `CallOwner.call_off`."""
        if self._closed or (is_expired and not self._propagates):
            return
        with interrupts.held, suppress(ZrpcError):
            self._peers.send(call.peer, Envelope(Cancel(call.call_id)))

    def unanswered(self, call: Call, error: BaseException | None) -> None:
        """See `CallOwner.unanswered`. What was not sent, or went to a worker that is gone, left nothing there."""
        passengers = self._hooks.passengers
        if passengers is not None and not self._closed and not issubclass(type(error), _LEFT_NOTHING):
            passengers.unanswered(call.peer, call.call_id, call.announced)

    def withdraw(self, call_id: int) -> bool:
        """See `CallOwner.withdraw`."""
        held = self._held.pop(call_id, None)
        if held is not None:
            held[0].gate.leave(call_id)
        return held is not None

    def discard(self, answer: Envelope) -> None:
        """An answer came that no thread asks for any more: its passengers are let go. See `CallOwner.discard`."""
        if answer.extras and self._hooks.passengers is not None:
            self._submit(partial(self._hooks.discard, answer.extras))

    def wait_for(self, wanted: Awaited, deadline: float | None) -> None:
        """See `Inbox.wait_for`."""
        self._inbox.wait_for(wanted, deadline, self._is_handler)

    def wake(self, wanted: Awaited) -> None:
        """See `Inbox.wake`."""
        self._inbox.wake(wanted)

    def open_answer(self, call: Call, envelope: Envelope) -> Payload:
        """See `CallOwner.open_answer`."""
        try:
            payload = open_payload(envelope, self._staging)
            self._hooks.receive_answer(call.peer, envelope.extras, payload)
        except ProtocolError as error:
            protocol_errors.received.note("answer", str(call.peer), error)
            raise
        if isinstance(envelope.message, Failure):
            raise load_exception(call.peer, envelope.message, payload)
        return payload

    # ---- messages in -----------------------------------------------------------------------------------------------

    def on_envelope(self, source: Incarnation, envelope: Envelope) -> Work | None:
        """Take in a message: an answer ends its call; anything else is a request. See `zrpc.transport.carrier`."""
        if isinstance(envelope.message, Reply | Failure):
            work = self.calls.finish(envelope.call_id, envelope, None)
            if work is None or self._inbox.can_work:
                return work
            self.completions.submit(work)
            return None
        return self._on_request(source, envelope)

    def on_checked_envelope(self, source: Incarnation, envelope: Envelope) -> Work | None:
        """The same where an answer may be of another worker than the one that was called: it is dropped then."""
        if isinstance(envelope.message, Reply | Failure) and (
            self.calls.is_of_another(source, envelope.call_id) or not self._peers.is_here(source)
        ):
            text = "an answer of %s to a call of another worker was dropped"
            finalizers.defer(partial(log.warning, text, source.hex()))
            return None
        return self.on_envelope(source, envelope)

    def may_wait(self) -> bool:
        """Whether this thread may wait for what another one is to read or to complete."""
        return not (self._inbox.is_read_here or self.completions.is_here() or self._is_loop())

    def _standing(self) -> Standing:
        """How this thread stands to waiting for room."""
        inbox = self._inbox
        if not self.may_wait():
            return Standing.NEEDED
        return Standing.SERVING if inbox.is_reader_here or self._is_handler() else Standing.FREE
