"""The gate that requests pass on their way to a peer: a window under its lock, and a place to wait.

A small call that need not wait passes without a lock. It is enough that whoever leaves looks at the line of waiting
requests *after* it has left, and whoever gets into line looks for room again *after* it has: one of the two sees the
other.

Not every thread may wait (`Standing`). One that serves a request keeps room in its caller's window until it answers;
were it to wait for room itself, requests that call each other could all wait in a circle. So it may always have one
call on the way, room or not, and waits with the next. Then the innermost call of every chain goes on, and so do the
others.
"""

from __future__ import annotations

import threading
import time
from enum import Enum
from typing import TYPE_CHECKING

from zrpc import interrupts
from zrpc.agent.pool import blocking
from zrpc.agent.window import UNKNOWN, Window
from zrpc.errors import OverloadedError
from zrpc.ids import Incarnation
from zrpc.wire.envelope import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.errors import ZrpcError
    from zrpc.ids import WorkerInfo
    from zrpc.wire.envelope import Envelope

LEAST_LEFT_S = 0.001
"""What a call has left of its time limit, at least, when it leaves: 0 would be no limit."""


class Standing(Enum):
    """How a thread stands to waiting for room."""

    FREE = "nobody waits for it: it may wait"
    SERVING = "it serves a request: it may wait while a call that it made without room is on the way"
    NEEDED = "it reads messages or completes futures: it must not wait"


def needed() -> Standing:
    """For control messages, which do not wait for room."""
    return Standing.NEEDED


class _Ahead(threading.local):
    """The last call that this thread made without room."""

    gate: Gate | None = None
    call_id = 0


_ahead = _Ahead()


class Gate:
    """The way to one peer. Any thread may use it; the lock owns the window, but for what may be used without."""

    __slots__ = ("_end", "_lock", "_max_calls", "_max_nbytes", "_window")

    def __init__(self, max_nbytes: int, max_calls: int) -> None:
        self._max_nbytes = max_nbytes
        self._max_calls = max_calls
        self._lock = threading.Lock()
        self._window: Window[threading.Event] = Window(max_nbytes, max_calls)
        self._end: ZrpcError | None = None

    @property
    def nbytes(self) -> int:
        """Counted bytes on the way."""
        return self._window.nbytes

    @property
    def num_calls(self) -> int:
        """Requests on the way."""
        return self._window.num_calls

    def seen(self) -> dict[str, int]:
        """What is on the way, what waits for room, and how much may be on the way."""
        window = self._window
        return {
            "calls": window.num_calls, "nbytes": window.nbytes, "waiting": window.num_waiting,
            "max_calls": self._max_calls, "max_nbytes": self._max_nbytes,
        }  # fmt: skip

    def enter(
        self, call_id: int, envelope: Envelope, to: WorkerInfo, limit_s: float, standing: Callable[[], Standing]
    ) -> float:
        """Count a request, once there is room for it.

        Args:
            call_id: the request's.
            envelope: what is to be sent.
            to: the callee, for the error.
            limit_s: how long it may wait in seconds; 0: no limit.
            standing: of this thread; it is asked if there is no room.

        Returns:
            What is left of `limit_s`; 0 if that is 0.

        Raises:
            OverloadedError: there was no room in time.
            ZrpcError: what `close` was given meanwhile.
        """
        nbytes = payload_nbytes(envelope)
        if self._window.take(call_id, nbytes):
            return limit_s
        with self._lock:
            if self._window.ask(call_id, nbytes):
                return limit_s
            if self._must_pass(standing(), call_id):
                self._window.force(call_id, nbytes)
                return limit_s
            turn = threading.Event()
            self._wake(self._window.line_up(call_id, nbytes, turn))
        return self._wait(turn, call_id, nbytes, to, limit_s)

    def is_on_the_way(self, call_id: int) -> bool:
        """Whether that request has passed, and was not answered yet."""
        return self._window.is_on_the_way(call_id)

    def leave(self, call_id: int) -> bool:
        """A request was answered, or did not leave. False if it is not on the way."""
        window = self._window
        nbytes = window.forget(call_id)
        if nbytes > 0 or window.num_waiting:
            with self._lock:
                self._wake(window.release(max(nbytes, 0)))
        return nbytes != UNKNOWN

    def leave_but(self, still_on_the_way: Callable[[int], bool]) -> None:
        """The connection broke: requests that ran out of time before, and may never be answered now, count no more."""
        for call_id in self._window.call_ids:
            if not still_on_the_way(call_id):
                self.leave(call_id)

    def check_answer(self, waiting_nbytes: int, here: WorkerInfo, to: WorkerInfo) -> None:
        """Answers do not wait for room, so where the peer does not read, one too many cannot be sent.

        Args:
            waiting_nbytes: what waits here for the peer.
            here: this worker.
            to: the peer.

        Raises:
            OverloadedError: what waits is more than the requests that may be among it, and a window's worth of answers.
        """
        if self._max_nbytes and waiting_nbytes > self._max_nbytes + self._window.nbytes:
            raise OverloadedError(
                f"the answer was dropped: {waiting_nbytes} bytes wait at {here} for {to}, which does not read them. "
                f"Ask for less at once, or change max_in_flight_nbytes ({self._max_nbytes}) of the options there"
            )

    def close(self, end: ZrpcError) -> None:
        """The peer is gone. Who waits gets `end` raised; who comes later passes, and is told by the transport."""
        with self._lock:
            self._end = end
            self._wake(self._window.close())

    def _must_pass(self, standing: Standing, call_id: int) -> bool:
        """Whether this thread's request passes without room."""
        if standing is not Standing.SERVING:
            return standing is Standing.NEEDED
        if _ahead.gate is not None and _ahead.gate.is_on_the_way(_ahead.call_id):
            return False
        _ahead.gate, _ahead.call_id = self, call_id
        return True

    def _wait(self, turn: threading.Event, call_id: int, nbytes: int, to: WorkerInfo, limit_s: float) -> float:
        begun = time.monotonic()
        try:
            with blocking():
                came = _wait_for(turn, begun + limit_s if limit_s else None)
        except BaseException:  # of a signal handler: the request will not be sent
            self._withdraw(call_id)
            self.leave(call_id)
            raise
        if not came:
            self._withdraw(call_id)
            if not turn.is_set():  # else its turn came in this very moment
                raise self._refusal(nbytes, to, limit_s)
        if self._end is not None:
            raise type(self._end)(f"{self._end}. The call was not sent")
        return max(LEAST_LEFT_S, limit_s - (time.monotonic() - begun)) if limit_s else 0.0

    def _withdraw(self, call_id: int) -> None:
        """Wait no longer."""
        with self._lock:
            self._wake(self._window.withdraw(call_id))

    def _refusal(self, nbytes: int, to: WorkerInfo, limit_s: float) -> OverloadedError:
        window = self._window
        return OverloadedError(
            f"a call with {nbytes} bytes to {to} was not sent: for {limit_s:g} s there was no room for it, because "
            f"{window.num_calls} calls with {window.nbytes} counted bytes are unanswered. Call more slowly, or change "
            f"max_in_flight_nbytes ({self._max_nbytes}) or max_in_flight_calls ({self._max_calls}) of the options"
        )

    @staticmethod
    def _wake(turns: list[threading.Event]) -> None:
        for turn in turns:
            turn.set()


def _wait_for(turn: threading.Event, deadline: float | None) -> bool:
    return interrupts.restart(
        lambda: interrupts.wait(lambda: turn.wait(None if deadline is None else deadline - time.monotonic()))
    )


class Gates(dict[Incarnation, Gate]):
    """The gates of one worker, by the life of the peer; they are made as they are asked for.

    Args:
        max_nbytes: see `Window`.
        max_calls: see `Window`.
        is_here: whether a life is in the group. The gate of one that is over is not kept.
    """

    def __init__(
        self, max_nbytes: int, max_calls: int, is_here: Callable[[Incarnation], bool] = lambda _: True
    ) -> None:
        super().__init__()
        self._max_nbytes = max_nbytes
        self._max_calls = max_calls
        self._is_here = is_here

    def __missing__(self, peer: Incarnation) -> Gate:
        gate = self.setdefault(peer, Gate(self._max_nbytes, self._max_calls))
        if not self._is_here(peer):  # `drop` may have passed by
            self.pop(peer, None)
        return gate

    def leave(self, call_id: int) -> None:
        """A request that is not under way any more was answered; it is not known to whom it went."""
        for gate in list(self.values()):
            if gate.leave(call_id):
                return

    def drop(self, peer: Incarnation, end: ZrpcError) -> None:
        """The peer is gone: who waits gets `end` raised."""
        gate = self.pop(peer, None)
        if gate is not None:
            gate.close(end)

    def close(self, end: ZrpcError) -> None:
        """This worker shuts down: who waits gets `end` raised."""
        for peer in list(self):
            self.drop(peer, end)


def payload_nbytes(envelope: Envelope) -> int:
    """What the payload of `envelope` takes, in bytes."""
    nbytes = len(envelope.data)
    return nbytes + nbytes_of(envelope.buffers) if envelope.buffers else nbytes
