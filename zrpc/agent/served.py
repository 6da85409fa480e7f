"""What a function that serves a call may know of that call: whether it was cancelled, and what is left of its time.

What: the call that code serves is the value of a context variable. A handler thread sets it around the function,
asyncio hands it on to tasks, and `Future.then` to its callbacks. Calls made in that context are *nested*: they have no
more time than is left, and are cancelled with the call.

Threads: any. Each attribute is set or changed by single operations, which are atomic. Whoever registers something looks
whether the call is cancelled *after* it has, and whoever cancels looks for what is registered after it has said so.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from zrpc.errors import CallCancelledError, RpcTimeoutError
from zrpc.functions import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.errors import ZrpcError

PRUNE_MIN_COUNT = 32
"""So many nested calls are noted before those that have ended are looked for."""


class ServedCall:
    """A call as far as code that serves it may ask about it.

    Attributes:
        began: when it came (`time.monotonic`).
        deadline: when its caller gives up (`time.monotonic`); None: never.
        function: the name of the function that it runs; None: it runs none, or not yet.
        is_cancelled: its caller waits no longer, and has said so, or code that serves it was told that its time is
            over. What comes of it is no result any more.
    """

    __slots__ = ("_listeners", "_nested", "_prune_at", "began", "deadline", "function", "is_cancelled")

    def __init__(self, time_left_ms: int | None) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + time_left_ms / 1000 if time_left_ms else None
        self.function: str | None = None
        self.is_cancelled = False
        self._nested: dict[int, None] | None = None
        self._listeners: dict[Callable[[], object], None] | None = None

    def runs(self, function: object) -> None:
        """It runs `function`."""
        self.function = name_of(function)

    def left_s(self) -> float | None:
        """What is left of its time in seconds, 0 or more; None: it has no limit."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def over(self) -> ZrpcError | None:
        """Why nothing more need be done for it, as what a call made for it now raises; None: it goes on."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return RpcTimeoutError(
                "RPC ran for more than its time limit: none is left where it is served, or was to be"
            )
        if self.is_cancelled:
            return CallCancelledError("the call that is served here was cancelled by its caller")
        return None

    def is_over(self) -> bool:
        """Whether nothing waits for it any more. If so, what it answers with is an error from now on."""
        if not self.is_cancelled and self.over() is not None:
            self.is_cancelled = True
        return self.is_cancelled

    def limit_s(self, own_s: float) -> float:
        """The time limit of a nested call, in seconds, whose own one is `own_s`; 0: none."""
        left_s = self.left_s()
        if left_s is None:
            return own_s
        left_s = max(left_s, 0.001)  # 0 would be no limit
        return min(own_s, left_s) if own_s else left_s

    def add_nested(self, call_id: int, is_under_way: Callable[[int], bool]) -> None:
        """A call of this worker is made for this one. Those that have ended are forgotten now and then."""
        nested = self._nested
        if nested is None:
            nested = self._nested = {}
            self._prune_at = PRUNE_MIN_COUNT
        nested[call_id] = None
        if len(nested) > self._prune_at:
            for one in list(nested):
                if not is_under_way(one):
                    nested.pop(one, None)
            self._prune_at = max(PRUNE_MIN_COUNT, 2 * len(nested))

    def when_cancelled(self, listener: Callable[[], object]) -> None:
        """Call `listener()` when it is cancelled, on a thread that reads: it must not block. At once if it is."""
        if self._listeners is None:
            self._listeners = {}
        self._listeners[listener] = None
        if self.is_cancelled and self._take(listener):
            listener()

    def cancel(self) -> list[int]:
        """It is cancelled: tell who listens. Which calls were made for it, and may be under way."""
        self.is_cancelled = True
        for listener in list(self._listeners or ()):
            if self._take(listener):
                listener()
        return list(self._nested or ())

    def _take(self, listener: Callable[[], object]) -> bool:
        """Whether this thread is to call it."""
        listeners = self._listeners
        return listeners is not None and listeners.pop(listener, self) is None


serving: ContextVar[ServedCall | None] = ContextVar("zrpc.serving", default=None)
"""The call that is served here; None: none is."""


@contextmanager
def serving_of(call: ServedCall | None) -> Iterator[None]:
    """What runs in the body serves `call`."""
    token = serving.set(call)
    try:
        yield
    finally:
        serving.reset(token)


def is_cancelled() -> bool:
    """Whether nothing waits any more for the call that is served here: it was cancelled, or its time is over.

    A long function asks now and then, and returns early. False outside of a served call.
    """
    call = serving.get()
    return call is not None and call.is_over()


def time_remaining() -> float | None:
    """How many seconds are left of the time limit of the call that is served here, 0 or more.

    None: it has no limit, or no call is served here.
    """
    call = serving.get()
    return None if call is None else call.left_s()
