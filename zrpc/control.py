"""The control thread of a worker.

What: one thread runs, one after the other and in the order in which they came: what is to be done about members that
left, repeats of messages that were not acknowledged, time limits, and what destructors and reading threads left
(`zrpc.finalizers`).

Invariants: a task runs under no lock. Tasks do not wait for another worker and run no user code but handlers of logs,
so none keeps the others waiting for long. After tasks of destructors the thread leaves further ones for `REST_S`, so
that a program that drops something after each call does not pay for a change of threads each time.

Threads: `submit` and `wake` take no lock of this module: they may be called from signal handlers and destructors.

Failure: a task that raises is logged. If the thread cannot be started, `start` raises and nothing has changed.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from zrpc import finalizers, threads
from zrpc.exception_text import log_error

if TYPE_CHECKING:
    from collections.abc import Callable

    Task = Callable[[], object]

log = logging.getLogger("zrpc")

REST_S = 0.005


class ControlThread:
    """The control thread.

    Args:
        run_timers: does what is due, and gives the seconds until more will be; None: nothing is to come. It is called
            after each task, and after `wake`.
    """

    def __init__(self, run_timers: Callable[[], float | None] = lambda: None) -> None:
        self._run_timers = run_timers
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._looks_for_finalizers = False
        self._rest_until = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to run tasks.

        Raises:
            LimitError: the system gives no thread.
        """
        self._thread = threads.start(self._run, "zrpc-control")
        finalizers.wake_with(self._on_deferred)

    def submit(self, task: Task) -> None:
        """Run `task` after those that were submitted before."""
        self._tasks.put(task)

    def wake(self) -> None:
        """Something is due earlier than `run_timers` said."""
        self._tasks.put(_nothing)

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was submitted and deferred by now is done, up to `timeout_s`."""
        if self._thread in (None, threading.current_thread()):
            finalizers.run_pending()
            return
        done = threading.Event()
        self.submit(finalizers.run_pending)
        self.submit(done.set)
        done.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Run what was submitted, then end; wait up to `timeout_s` for it. Idempotent."""
        finalizers.do_not_wake(self._on_deferred)
        if self._thread is not None:
            self._tasks.put(None)
            if threading.current_thread() is not self._thread:
                threads.join(self._thread, timeout_s)

    def _on_deferred(self) -> None:
        if not self._looks_for_finalizers:
            self._looks_for_finalizers = True
            self._tasks.put(_nothing)

    def _run(self) -> None:
        while True:
            try:
                wait_s = self._run_timers()
                if self._looks_for_finalizers:
                    wait_s = self._look_for_finalizers(wait_s)
                task = self._tasks.get(timeout=None if wait_s is None else max(0.0, wait_s))
            except Empty:
                continue
            except BaseException as error:
                log_error(log, "a time limit was not kept", error=error)
                del error
                continue
            if task is None:
                break
            try:
                task()
            except BaseException as error:
                log_error(log, "a task of the control thread failed", error=error)
                del error
            del task
        finalizers.run_pending()

    def _look_for_finalizers(self, wait_s: float | None) -> float | None:
        """Run what was deferred, unless it is time to rest; how long to wait then."""
        left_s = self._rest_until - time.monotonic()
        if left_s <= 0:
            self._looks_for_finalizers = False  # what is deferred from now on wakes the thread
            if not finalizers.run_pending():
                return wait_s
            self._looks_for_finalizers = True
            self._rest_until, left_s = time.monotonic() + REST_S, REST_S
        return left_s if wait_s is None else min(left_s, wait_s)


def _nothing() -> None:
    """Only wakes the thread."""
