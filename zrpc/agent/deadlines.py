"""Time limits of calls that no thread of their own waits for.

Deadlines are kept in buckets of `TICK_S`; a thread sleeps until the next bucket is due. To add one costs an append, and
nothing is done when a call ends in time: its deadline finds nothing to end. Once most of them are of calls that have
ended, these are swept out, so that what is kept depends on how many calls are under way, not on how long they may take.
"""

from __future__ import annotations

import heapq
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TICK_S = 0.005
SWEEP_MIN_COUNT = 4096
"""As long as there are fewer, none is swept out."""


class Deadlines:
    """Calls `expire(key)` for each key when its time has come. The tables are owned by the condition.

    Args:
        expire: ends what has not ended.
        is_live: whether it has not.
    """

    def __init__(self, expire: Callable[[int], None], is_live: Callable[[int], bool]) -> None:
        self._expire = expire
        self._is_live = is_live
        self._condition = threading.Condition()
        self._buckets: dict[int, list[int]] = {}
        self._due: list[int] = []
        self._count = 0  # of keys, and of those whose time has come since the last sweep
        self._sweep_at = SWEEP_MIN_COUNT
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, key: int, after_s: float) -> None:
        """`key` expires `after_s` seconds from now, or up to `TICK_S` later."""
        tick = int((time.monotonic() + after_s) / TICK_S) + 1
        with self._condition:
            self._count += 1
            if self._count > self._sweep_at:
                self._sweep()
            bucket = self._buckets.get(tick)
            if bucket is not None:
                bucket.append(key)
                return
            self._buckets[tick] = [key]
            heapq.heappush(self._due, tick)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="zrpc-deadlines", daemon=True)
                self._thread.start()
            elif self._due[0] == tick:
                self._condition.notify()

    def close(self) -> None:
        """End the thread; what has not expired never will. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _sweep(self) -> None:
        """Forget what has ended. Call it under the condition; what it costs is twice one look for each key added."""
        live = {tick: [key for key in keys if self._is_live(key)] for tick, keys in self._buckets.items()}
        self._buckets = {tick: keys for tick, keys in live.items() if keys}
        self._due = sorted(self._buckets)  # a heap
        self._count = sum(map(len, self._buckets.values()))
        self._sweep_at = max(SWEEP_MIN_COUNT, 2 * self._count)

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._closed:
                    return
                wait_s = self._due[0] * TICK_S - time.monotonic() if self._due else None
                if wait_s is None or wait_s > 0:
                    self._condition.wait(wait_s)
                    continue
                keys = self._buckets.pop(heapq.heappop(self._due))
            for key in keys:
                self._expire(key)
