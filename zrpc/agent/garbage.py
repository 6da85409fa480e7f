"""Values that nobody uses any more, and whose `__del__` is user code: they are let go of on a thread of their own.

Threads: any may `drop`. Failure: after `close` nothing is taken, and the caller lets go itself.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from zrpc import finalizers
from zrpc.agent.pool import HandlerPool


class Garbage:
    """What waits to be let go of, and the thread that does so."""

    def __init__(self) -> None:
        self._pool = HandlerPool(1, "zrpc-finalizer")
        self._waiting: deque[list[Any]] = deque()
        self._is_open = True

    def drop(self, values: list[Any]) -> None:
        """Let go of `values` soon. The caller keeps none."""
        if self._is_open:
            self._waiting.append(values)
            finalizers.defer(self._let_go)

    def close(self, timeout_s: float) -> None:
        """Let go of what waits, up to `timeout_s`, and take no more."""
        self._is_open = False
        self._let_go()
        self._pool.close(timeout_s)

    def _let_go(self) -> None:
        """Let go of all that was dropped by now; later tasks of a round of the control thread find nothing."""
        values: list[list[Any]] = []
        while self._waiting:
            values.append(self._waiting.popleft())
        if values:
            self._pool.submit(values.clear)
