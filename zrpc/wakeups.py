"""Threads that wait until something is done, each with a wake-up of its own.

What: a thread that waits gets a lock that is taken; to wake it is to release that lock. So no thread can take away what
was to wake another one.

Threads: `wait` and `wake_all` from any.

Failure: where a signal handler raises, or the time is up, the wake-up is dropped.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from zrpc import interrupts

if TYPE_CHECKING:
    from collections.abc import Callable


class WakeUps:
    """Those that wait for one thing."""

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: list[threading.Lock] = []

    def wait(self, is_done: Callable[[], bool], deadline: float | None) -> None:
        """Wait until `wake_all` is called, unless `is_done()` is true already, up to `deadline` (`time.monotonic`).

        Raises:
            Interrupted: see `zrpc.interrupts.wait`.
        """
        lock = threading.Lock()
        lock.acquire()
        self._locks.append(lock)
        try:
            if not is_done():
                timeout_s = -1 if deadline is None else max(0.0, deadline - time.monotonic())
                interrupts.wait(lambda: lock.acquire(timeout=timeout_s))
        finally:
            if lock in self._locks:
                self._locks.remove(lock)

    def wake_all(self) -> None:
        """It is done: let `is_done()` be true from now on."""
        for lock in tuple(self._locks):
            with suppress(RuntimeError):  # another thread has
                lock.release()


class WakeUp:
    """Wakes one thread. To be woken twice before it waits is to be woken once."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake it, or keep it from waiting next time."""
        with suppress(RuntimeError):
            self._lock.release()

    def wait(self, timeout_s: float | None) -> None:
        """Wait to be woken, up to `timeout_s` seconds; None: no limit."""
        self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
