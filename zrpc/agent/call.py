"""One call under way, as its caller sees it.

What: a call is done once, by the thread that takes it out of the table of calls under way: the one that reads, with the
answer, or the one that ends it because of its deadline, a lost peer or the closing agent. What came is opened (tensors
made, hooks told, exception rebuilt) by the first thread that asks for the outcome.

Invariants: any number of threads may wait, and each has a wake-up of its own. Callbacks run once.

Threads: `_lock` owns the outcome until it is opened, and is never held while anything is waited for or opened. The
thread that opens it is the only one that does; others that ask meanwhile wait for it.

Failure: what opening raises is the outcome, but for what a signal handler raises: then the next thread that asks opens
it, as far as that is still possible.
"""

from __future__ import annotations

import logging
import threading
import time
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Protocol

from zrpc import finalizers, interrupts
from zrpc.agent.pool import blocking, is_counted
from zrpc.errors import CallCancelledError, RpcTimeoutError
from zrpc.exception_text import log_error, without_traceback
from zrpc.staging import handover
from zrpc.wakeups import WakeUps
from zrpc.wire.messages import Failure
from zrpc.wire.raisable import Raisable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from zrpc.agent.gate import Gate
    from zrpc.ids import WorkerInfo
    from zrpc.staging.streams import Mark
    from zrpc.transport.inbox import Work
    from zrpc.wire.envelope import Envelope
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload


log = logging.getLogger("zrpc")

_CALLBACK_FAILED = "a callback of %s to %s failed"


class CallOwner(Protocol):
    """What a call needs of its agent."""

    def abandon(self, call_id: int) -> bool:
        """Take the call out of the table; False if it is done already."""

    def call_off(self, call: Call, *, is_expired: bool) -> None:
        """Tell the callee that the answer is not waited for any more; `is_expired`: because the time ran out."""

    def unanswered(self, call: Call, error: BaseException | None) -> None:
        """A call of users ended with `error`, and without an answer. It must not block."""

    def withdraw(self, call_id: int) -> bool:
        """Have the call not be sent, if it still waits for a connection; False: it may have been sent."""

    def discard(self, answer: Envelope) -> None:
        """Let go of an answer that no thread will ask for."""

    def wait_for(self, wanted: Call, deadline: float | None) -> None:
        """See `Inbox.wait_for`."""

    def wake(self, wanted: Call) -> None:
        """See `Inbox.wake`."""

    def open_answer(self, call: Call, envelope: Envelope) -> Payload:
        """The payload of an answer; raises the remote exception if it is a failure."""


class _Opening(Enum):
    """How far what came is opened."""

    CLOSED = "no thread has asked for it"
    BEGUN = "a thread is at it"
    DONE = "the outcome is there"


_DONE = _Opening.DONE


class Call:
    """A request that was sent, or could not be. Any thread may use it.

    Args:
        owner: ends it, and opens its answer.
        waited: one thread waits for it, at once, and keeps its time limit: if that is interrupted, it has ended.
        of_users: it is a call of users, whose callee is told where the answer is not waited for any more.
        announced: what went with it about passengers; see `Hooks.announced`.

    Attributes:
        peer: who was called.
        gate: where it counts until it is answered.
        message: what was asked.
        timeout_s: its time limit in seconds; 0: none.
        function: the name of the function that the callee is to run, where it is known.
        began: when it was made (`time.monotonic`).
        failed: whether it is done and went wrong.
    """

    __slots__ = (
        "_answer", "_callbacks", "_deadline", "_error", "_inline", "_lock", "_mark", "_of_users", "_opening", "_owner",
        "_payload", "_raised", "_waited", "_wake_ups", "announced", "began", "call_id", "failed", "function", "gate",
        "message", "peer", "timeout_s",
    )  # fmt: skip

    def __init__(
        self, owner: CallOwner, call_id: int, peer: WorkerInfo, gate: Gate, message: Message, timeout_s: float,
        waited: bool, of_users: bool = False, announced: object = None, function: str | None = None,
    ) -> None:  # fmt: skip
        self._owner = owner
        self._of_users = of_users
        self._waited = waited
        self.call_id = call_id
        self.peer = peer
        self.gate = gate
        self.message = message
        self.timeout_s = timeout_s
        self.failed = False
        self.announced = announced
        self.function = function
        self.began = time.monotonic()
        self._deadline = self.began + timeout_s if timeout_s else None
        self._lock = threading.Lock()
        self._wake_ups: WakeUps | None = None  # made by the first thread that waits and does not read
        self._inline: list[Callable[[Call], None]] | None = None
        self._callbacks: list[Callable[[Call], None]] | None = []  # None: it is done
        self._answer: Envelope | None = None
        self._opening = _Opening.CLOSED
        self._payload: Payload | None = None
        self._error: BaseException | None = None
        self._raised: Raisable | None = None
        self._mark: Mark | None = None  # in the streams of the thread that opened the answer

    def complete(self, answer: Envelope | None, error: BaseException | None) -> Work | None:
        """Set what came of the call. For the agent; once.

        Returns:
            What is to be done next, on a thread that does not read: the callbacks; None: nothing.
        """
        self._answer, self._error = answer, error
        self.failed = answer is None or isinstance(answer.message, Failure)
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
            inline, self._inline = self._inline, None
            wake_ups = self._wake_ups
        if wake_ups is not None:
            wake_ups.wake_all()
        if answer is None and self._of_users:
            self._owner.unanswered(self, error)
        if inline:
            self._run(inline)
        return partial(self._run, callbacks) if callbacks else None

    def done(self) -> bool:
        """Whether the outcome is here."""
        return self._callbacks is None

    def add_done_callback(self, callback: Callable[[Call], None], *, inline: bool = False) -> None:
        """Call `callback(self)` when done: at once if it is, else on a thread that does not read.

        Args:
            callback: it must not wait for other workers.
            inline: call it on whichever thread ends the call, a reading one included: it runs no code of users, takes
                no time and does not ask for the outcome.
        """
        with self._lock:
            if self._callbacks is not None:
                if not inline:
                    self._callbacks.append(callback)
                elif self._inline is None:
                    self._inline = [callback]
                else:
                    self._inline.append(callback)
                return
        callback(self)

    def wait(self) -> Payload:
        """Wait for the answer, up to the call's own time limit.

        Returns:
            The answer's payload; its tensors are made, its stream is not yet read.

        Raises:
            RpcTimeoutError: the time ran out.
            PeerLostError: the peer died or left.
            AgentClosedError: this worker shut down.
            Exception: whatever the remote function raised.
        """
        self.await_done()
        try:
            return self.result()
        finally:
            del self  # see `result`

    def await_done(self) -> None:
        """Wait until the call is done, up to its own time limit; if nobody else reads messages, this thread does."""
        if self._callbacks is None:
            return
        if is_counted():
            with blocking():
                self._await()
        else:
            self._await()

    def result(self) -> Payload:
        """The outcome of a call that is done; see `wait`."""
        assert self._callbacks is None
        if self._opening is not _DONE:
            if self._waited:  # no other thread asks
                try:
                    self._open_here()
                    self._opening = _DONE
                except interrupts.Interrupted:
                    interrupts.run_handlers()
                    self._ensure_open()
            else:
                self._ensure_open()
        error, payload, mark = self._error, self._payload, self._mark
        if error is not None:
            if not self._waited:  # else one thread waits, once
                with self._lock:
                    self._raised = self._raised or Raisable(error)
                error = self._raised.copy()
            try:
                raise error
            finally:
                del error, self  # its traceback would keep what keeps it: a cycle, and whatever the callers hold
        assert payload is not None
        if mark is not None:
            mark.join()
        return payload

    @property
    def is_unopened(self) -> bool:
        """Whether it was answered, and no thread has asked for the outcome yet."""
        return self._answer is not None

    @property
    def is_empty(self) -> bool:
        """Whether a call that is done, and whose outcome no thread has asked for yet, was answered with nothing."""
        answer = self._answer
        return answer is not None and not answer.data

    @property
    def error(self) -> BaseException | None:
        """What went wrong with the call; None if nothing did, or it is not done."""
        if self._callbacks is None and self._opening is not _DONE:
            self._ensure_open()
        return self._error

    def expire(self) -> Work | None:
        """End the call because its time ran out; as `complete`. For the agent, which has taken it out of its table."""
        if self._of_users:
            self._owner.call_off(self, is_expired=True)
        return self.complete(None, self._timed_out())

    def cancel(self) -> bool:
        """End a call of users with `CallCancelledError`, and tell its callee; false if it is done already."""
        with interrupts.held:
            if not self._of_users or not self._owner.abandon(self.call_id):
                return False
            self._owner.call_off(self, is_expired=False)
            what = f"{type(self.message).__name__} to {self.peer}"
            work = self.complete(
                None, CallCancelledError(f"{what} was cancelled. It is not known whether it ran there")
            )
            self._owner.wake(self)
        _do(work)
        return True

    def block(self, deadline: float | None) -> None:
        """See `Awaited.block`."""
        with self._lock:
            if self._callbacks is None:
                return
            wake_ups = self._wake_ups = self._wake_ups or WakeUps()
        wake_ups.wait(self.done, deadline)

    def _run(self, callbacks: list[Callable[[Call], None]]) -> None:
        for callback in callbacks:
            try:
                callback(self)
            except Exception as error:  # the others are of other floors
                what = type(self.message).__name__
                finalizers.defer(partial(log_error, log, _CALLBACK_FAILED, what, self.peer, error=error))

    def _await(self) -> None:
        try:
            self._owner.wait_for(self, self._deadline)
            if self._callbacks is None:
                return
            interrupts.restart(lambda: self.block(self._deadline))  # this worker shuts down, or the time is up
            if self._callbacks is not None and self._owner.abandon(self.call_id):
                _do(self.expire())
            interrupts.restart(lambda: self.block(None))
        except BaseException as interrupt:
            if self._waited:
                self._give_up(interrupt)
            raise

    def _give_up(self, interrupt: BaseException) -> None:
        """The thread that was to ask for the outcome is interrupted: no other one will."""
        if self._owner.abandon(self.call_id):
            if self._of_users:
                self._owner.call_off(self, is_expired=False)
            _do(self.complete(None, interrupt))
        else:
            interrupts.restart(lambda: self.block(None))
            answer, self._answer = self._answer, None
            if answer is not None:
                self._owner.discard(answer)

    def _timed_out(self) -> RpcTimeoutError:
        return RpcTimeoutError(
            f"RPC ran for more than its time limit of {self.timeout_s * 1000:g} ms: "
            f"{type(self.message).__name__} to {self.peer}. {_what_became(self._owner.withdraw(self.call_id))}"
        )

    def _ensure_open(self) -> None:
        try:
            self._open()
        except interrupts.Interrupted:
            interrupts.run_handlers()
            interrupts.restart(self._open)

    def _open(self) -> None:
        """Open what came, or wait until the thread that does has."""
        with self._lock:
            opens_here = self._opening is _Opening.CLOSED
            if opens_here:
                self._opening = _Opening.BEGUN
            wake_ups = self._wake_ups
            if not opens_here and wake_ups is None:
                wake_ups = self._wake_ups = WakeUps()
        if not opens_here:
            assert wake_ups is not None
            wake_ups.wait(lambda: self._opening is not _Opening.BEGUN, None)
            if self._opening is _Opening.CLOSED:  # that thread was interrupted
                self._open()
            return
        after = _Opening.CLOSED
        try:
            self._open_here()
            after = _Opening.DONE
        finally:
            with self._lock:
                self._opening = after
                wake_ups = self._wake_ups
            if wake_ups is not None:
                wake_ups.wake_all()

    def _open_here(self) -> None:
        answer = self._answer
        if answer is None:
            return
        try:
            if answer.pending is not None:
                with blocking():
                    if not answer.pending.wait(self._deadline):
                        raise self._timed_out()
            self._answer = None
            self._payload = self._owner.open_answer(self, answer)
            if handover.streams is not None:
                self._mark = handover.streams.mark()
        except interrupts.Interrupted:
            raise
        except BaseException as error:
            self._answer, self._error = None, without_traceback(error)  # where it was unpacked is of no interest


def awaited_in(frame: FrameType) -> Call | None:
    """The call whose outcome a thread waits for in `frame`; None: it does not."""
    return frame.f_locals.get("self") if frame.f_code is Call.await_done.__code__ else None


def _what_became(is_unsent: bool) -> str:
    if is_unsent:
        return "It was not sent, as there is no connection to a broker: look whether one runs"
    return "It is not known whether it ran there. Give it more time with timeout=, or look at that worker"


def _do(work: Work | None) -> None:
    if work is not None:
        work()
