"""Telling observers of calls as they end: those that a worker makes, and those that it serves.

What: while an observer asks for it, the agent's parts hand each call to `_on_begun` and `_on_answer`. Otherwise they do
not, and there is nothing on the way of messages. Events wait in a bounded queue, which the control thread sends off
every `FLUSH_S`. What does not fit is counted and dropped.

Invariants: it is switched off when the last observer that asked leaves, is lost, or has not asked again for `RENEW_S`.

Threads: `_on_begun`, `_on_ended` and `_on_answer` run on any, and append to a deque; the rest is the control thread's.
"""

from __future__ import annotations

import math
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.sight.names import called_here, is_of_users, what_is_asked

if TYPE_CHECKING:
    from zrpc.agent.call import Call
    from zrpc.agent.observed import Observed, Question
    from zrpc.agent.request import Request
    from zrpc.ids import Incarnation

FLUSH_S = 0.1
RENEW_S = 5.0
"""So long after it was last asked for a trace goes on: an observer that was killed does not say that it leaves."""
WAITING_MAX = 5000
"""Events that wait to be sent."""


class Tracing:
    """Who wants to be told, and what happened since they were. See above.

    Args:
        observed: the worker.
    """

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._wanted: dict[Incarnation, tuple[Question, float]] = {}
        self._events: deque[list[Any]] = deque(maxlen=WAITING_MAX)
        self._num_events = 0  # since it was switched on
        self._num_sent = 0
        self._flush_at = math.inf

    @property
    def is_on(self) -> bool:
        """Whether an observer wants to be told."""
        return bool(self._wanted)

    def ask(self, question: Question) -> None:
        """An observer wants to be told, or goes on to."""
        was_off = not self._wanted
        self._wanted[question.life] = question, time.monotonic() + RENEW_S
        if was_off:
            self._num_events = self._num_sent = 0
            self._flush_at = time.monotonic() + FLUSH_S
            self._observed.trace(self._on_begun, self._on_answer)
        question.answer({"events": [], "dropped": 0})

    def forget(self, life: Incarnation) -> None:
        """An observer is gone."""
        if self._wanted.pop(life, None) is not None and not self._wanted:
            self._observed.trace(None, None)
            self._flush_at = math.inf
            self._events.clear()

    def run_due(self) -> float:
        """Send what happened, if it is time to; after how many seconds to call again."""
        now = time.monotonic()
        if now < self._flush_at:
            return self._flush_at - now
        self._flush_at = now + FLUSH_S
        for life, (_, until) in list(self._wanted.items()):
            if now >= until:
                self.forget(life)
        events = [self._events.popleft() for _ in range(len(self._events))]
        dropped = max(0, self._num_events - self._num_sent - len(events))
        self._num_sent = self._num_events
        if events:
            for question, _ in list(self._wanted.values()):
                question.answer({"events": events, "dropped": dropped})
        return self._flush_at - now if self._wanted else math.inf

    def _note(self, *event: Any) -> None:
        self._num_events += 1  # threads that do so at the same moment may miss one: it is shown, not counted on
        self._events.append([time.time(), *event])

    def _on_begun(self, call: Call) -> None:
        if not is_of_users(call.message):
            return
        function = called_here() or what_is_asked(call.message, b"")
        call.add_done_callback(partial(self._on_ended, function), inline=True)

    def _on_ended(self, function: str, call: Call) -> None:
        outcome = "failed" if call.failed else "ok"
        self._note("out", function, call.peer.name, time.monotonic() - call.began, outcome)

    def _on_answer(self, request: Request[Any], error: BaseException | None) -> None:
        if request.is_of_users:
            function = what_is_asked(request.message, request.stream)
            outcome = "ok" if error is None else type(error).__name__
            if request.is_cancelled:
                outcome = "cancelled"
            self._note("in", function, request.source.name, time.monotonic() - request.began, outcome)
