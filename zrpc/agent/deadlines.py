"""Time limits of calls that no thread of their own waits for.

What: deadlines are kept in buckets of `TICK_S`. To add one costs an append, and nothing is done when a call ends in
time: its deadline finds nothing to end. Once most of them are of calls that have ended, these are swept out, so that
what is kept depends on how many calls are under way, not on how long they may take.

Invariants: each key expires once, unless the table is closed first; those of an earlier tick first.

Threads: `add` from any thread, signal handlers included: it takes no lock. All else on the control thread.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TICK_S = 0.005
SWEEP_MIN_COUNT = 4096
"""As long as there are fewer, none is swept out."""
LOOK_S = 1.0
"""While there are more, it is looked so often whether most have ended."""


class Deadlines:
    """Calls `expire(key)` for each key when its time has come.

    Args:
        expire: ends what has not ended.
        is_live: whether it has not.
        num_live: how many have not ended.
        wake: has `run_due` called soon.
    """

    def __init__(
        self, expire: Callable[[int], None], is_live: Callable[[int], bool], num_live: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._expire = expire
        self._is_live = is_live
        self._num_live = num_live
        self._wake = wake
        self._added: deque[tuple[int, int]] = deque()  # ticks and keys that are not in the buckets yet
        self._next_tick: float = inf  # when `run_due` will be called at the latest
        self._buckets: dict[int, list[int]] = {}
        self._due: list[int] = []  # a heap of the buckets' ticks
        self._count = 0  # of keys, and of those whose time has come since the last sweep
        self._sweep_at = SWEEP_MIN_COUNT
        self._closed = False

    def __len__(self) -> int:
        """How many keys are kept, those that have ended and were not swept out yet included."""
        return len(self._added) + sum(map(len, self._buckets.values()))

    def add(self, key: int, after_s: float) -> None:
        """`key` expires `after_s` seconds from now, or up to `TICK_S` later."""
        tick = int((time.monotonic() + after_s) / TICK_S) + 1
        self._added.append((tick, key))
        if tick < self._next_tick:
            self._next_tick = tick
            self._wake()
        elif len(self._added) >= SWEEP_MIN_COUNT and len(self._added) % SWEEP_MIN_COUNT == 0:
            self._wake()

    def run_due(self) -> float | None:
        """Expire what is due; the seconds until more will be. None: nothing is kept."""
        while not self._closed:
            self._next_tick = -inf  # whoever adds meanwhile need not wake: what is added is looked at once more
            self._take_added()
            while self._due and self._due[0] * TICK_S <= time.monotonic():
                for key in self._buckets.pop(heapq.heappop(self._due)):
                    self._expire(key)
            self._next_tick = self._due[0] if self._due else inf
            if not self._added:
                break
        if self._closed or not self._due:
            return None
        if self._count > max(SWEEP_MIN_COUNT, 2 * self._num_live()):
            self._sweep()
            if not self._due:
                return None
        after_s = self._due[0] * TICK_S - time.monotonic()
        return after_s if self._count <= SWEEP_MIN_COUNT else min(after_s, LOOK_S)

    def close(self) -> None:
        """What has not expired never will. Idempotent."""
        self._closed = True

    def _take_added(self) -> None:
        while self._added:
            tick, key = self._added.popleft()
            self._count += 1
            bucket = self._buckets.get(tick)
            if bucket is None:
                self._buckets[tick] = [key]
                heapq.heappush(self._due, tick)
            else:
                bucket.append(key)
            if self._count > self._sweep_at:
                self._sweep()

    def _sweep(self) -> None:
        """Forget what has ended. What it costs is twice one look for each key added."""
        live = {tick: [key for key in keys if self._is_live(key)] for tick, keys in self._buckets.items()}
        self._buckets = {tick: keys for tick, keys in live.items() if keys}
        self._due = sorted(self._buckets)  # a heap
        self._count = sum(map(len, self._buckets.values()))
        self._sweep_at = max(SWEEP_MIN_COUNT, 2 * self._count)
