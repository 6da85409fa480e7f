"""One call under way, as its caller sees it.

A call is done once, by whoever takes it out of the table of calls under way first: the reading thread with the
answer, the deadline, a lost peer, or the closing agent. What came is opened (tensors made, hooks told, exception
rebuilt) by the first thread that asks for the outcome, not by the reading thread.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from zrpc.agent.pool import blocking
from zrpc.errors import RpcTimeoutError
from zrpc.exception_text import without_traceback
from zrpc.staging import handover
from zrpc.wire.messages import Failure
from zrpc.wire.raisable import Raisable

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import WorkerInfo
    from zrpc.staging.streams import Mark
    from zrpc.wire.envelope import Envelope
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload


log = logging.getLogger("zrpc")


class CallOwner(Protocol):
    """What a call needs of its agent."""

    def abandon(self, call_id: int) -> bool:
        """Take the call out of the table; False if it is done already."""

    def wait_for(self, wanted: Call, deadline: float | None) -> None:
        """See `Inbox.wait_for`."""

    def open_answer(self, call: Call, envelope: Envelope) -> Payload:
        """The payload of an answer; raises the remote exception if it is a failure."""


class Call:
    """A request that was sent, or could not be. Any thread may use it.

    Args:
        owner: ends it, and opens its answer.
        waited: one thread waits for it, at once, and keeps its time limit: if that is interrupted, it has ended.

    Attributes:
        peer: who was called.
        message: what was asked.
        timeout_s: its time limit in seconds; 0: none.
        is_read_for: a thread reads messages until this call is done. Whoever ends it without one tells the reader.
    """

    __slots__ = (
        "_answer", "_callbacks", "_deadline", "_done", "_error", "_lock", "_mark", "_opened", "_owner", "_payload",
        "_raised", "_waited", "call_id", "is_read_for", "message", "peer", "timeout_s",
    )  # fmt: skip

    def __init__(
        self, owner: CallOwner, call_id: int, peer: WorkerInfo, message: Message, timeout_s: float, waited: bool
    ) -> None:
        self._owner = owner
        self._waited = waited
        self.call_id = call_id
        self.peer = peer
        self.message = message
        self.timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s if timeout_s else None
        self._done = threading.Lock()
        self._done.acquire()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Call], None]] | None = []
        self._answer: Envelope | None = None
        self._opened = False
        self._payload: Payload | None = None
        self._error: BaseException | None = None
        self._raised: Raisable | None = None
        self._mark: Mark | None = None  # in the streams of the thread that opened the answer
        self.is_read_for = False

    def complete(self, answer: Envelope | None, error: BaseException | None) -> None:
        """Set what came of the call. For the agent; once."""
        self._answer, self._error = answer, error
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
        self._done.release()
        for callback in callbacks or ():
            try:
                callback(self)
            except Exception:  # it was some thread's duty to complete the call, and it has others
                log.exception("a callback of %s to %s failed", type(self.message).__name__, self.peer)

    def done(self) -> bool:
        """Whether the outcome is here."""
        return self._callbacks is None

    def add_done_callback(self, callback: Callable[[Call], None]) -> None:
        """Call `callback(self)` when done: at once if it is, else on the reading thread. It must not block."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
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
        if self._callbacks is not None:
            with blocking():
                self._await()

    def result(self) -> Payload:
        """The outcome of a call that is done; see `wait`."""
        assert self.done()
        with self._lock:
            if not self._opened:
                self._open()
            error, payload, mark = self._error, self._payload, self._mark
            if error is not None and not self._waited:  # else one thread waits, once
                self._raised = self._raised or Raisable(error)
                error = self._raised.copy()
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # its traceback would keep what keeps it: a cycle, and whatever the callers hold
        assert payload is not None
        if mark is not None:
            mark.join()
        return payload

    @property
    def failed(self) -> bool:
        """Whether a call that is done went wrong; tells it without unpickling what."""
        answer = self._answer
        return self._error is not None or (answer is not None and isinstance(answer.message, Failure))

    @property
    def is_empty(self) -> bool:
        """Whether a call that is done, and whose outcome nobody has asked for yet, was answered with nothing."""
        return self._answer is not None and not self._answer.data

    @property
    def error(self) -> BaseException | None:
        """What went wrong with the call; None if nothing did, or it is not done."""
        with self._lock:
            if not self._opened and self._callbacks is None:
                self._open()
            return self._error

    def expire(self) -> None:
        """End the call because its time ran out. For the agent, which has taken it out of its table."""
        self.complete(None, self._timed_out())

    def block(self, deadline: float | None) -> None:
        """See `Awaited.block`."""
        self.is_read_for = False
        if self._done.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            self._done.release()

    def _await(self) -> None:
        self.is_read_for = True
        try:
            self._owner.wait_for(self, self._deadline)
            if self._callbacks is None:
                return
            self.block(self._deadline)  # this worker shuts down, or the time is up
            if self._callbacks is not None and self._owner.abandon(self.call_id):
                self.expire()
            self.block(None)
        except BaseException as interrupt:
            if self._waited and self._owner.abandon(self.call_id):
                self.complete(None, interrupt)
            raise

    def _timed_out(self) -> RpcTimeoutError:
        return RpcTimeoutError(
            f"RPC ran for more than its time limit of {self.timeout_s * 1000:g} ms: "
            f"{type(self.message).__name__} to {self.peer}. It is not known whether it ran there. "
            "Give it more time with timeout=, or look at that worker"
        )

    def _open(self) -> None:
        self._opened = True
        answer, self._answer = self._answer, None
        if answer is None:
            return
        try:
            if answer.pending is not None:
                with blocking():
                    if not answer.pending.wait(self._deadline):
                        raise self._timed_out()
            self._payload = self._owner.open_answer(self, answer)
            if handover.streams is not None:
                self._mark = handover.streams.mark()
        except BaseException as error:
            self._error = without_traceback(error)  # the same; and where it was unpacked is of no interest
