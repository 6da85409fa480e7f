"""Handler threads: where user functions run.

The pool keeps `size` threads able to work. A thread that waits for a remote call says so (`blocking`), and while it
waits it does not count: work that is queued gets another thread. So calls that call back, however deep, cannot use up
the pool and wait for each other for ever. Threads are started when there is work for them, and those over `size` end.
Where the system gives no more threads, work waits for those that there are; each piece of work that comes tries again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from zrpc import finalizers
from zrpc.exception_text import log_error
from zrpc.threads import join

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

log = logging.getLogger("zrpc")

_NO_THREAD = (
    "no thread can be started (%s); tasks that wait: %d, threads that there are: %d. "
    "Raise the limit of processes (ulimit -u, pids.max), or set num_worker_threads lower"
)

Task = Callable[[], None]


class _Counter(Protocol):
    def change_waiting(self, by: int) -> None:
        """A thread waits (1), or does not any more (-1)."""


class _Here(threading.local):
    """The pool that this thread belongs to, and what is told when the thread waits."""

    pool: HandlerPool | None = None
    counter: _Counter | None = None


_here = _Here()
_not_counted = nullcontext()


def blocking() -> AbstractContextManager[None]:
    """While the body waits, this thread does not count as working. On a thread of no pool it does nothing."""
    counter = _here.counter
    return _not_counted if counter is None else _Waiting(counter)


def is_counted() -> bool:
    """Whether `blocking` does anything on this thread."""
    return _here.counter is not None


@contextmanager
def watching_waits(on_wait: Callable[[bool], None]) -> Iterator[None]:
    """While the body runs, `on_wait(True)` is called when this thread begins to wait, `on_wait(False)` after it.

    The second may itself wait; the thread does not count meanwhile either.
    """
    outer = _here.counter
    _here.counter = _Watched(outer, on_wait)
    try:
        yield
    finally:
        _here.counter = outer


class HandlerPool:
    """A pool that grows while its threads wait. The counters are owned by the lock.

    Args:
        size: how many threads may work at once.
        name: prefix of the threads' names.

    Attributes:
        around: runs each task, if it is not None.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._waiting = 0
        self._started = 0
        self._closed = False
        self.around: Callable[[Task], None] | None = None

    def run_with(self, around: Callable[[Task], None] | None) -> None:
        """From now on `around` runs each task; None: nothing does."""
        self.around = around

    def submit(self, task: Task) -> None:
        """Run `task` soon on a handler thread. After `close` it is dropped."""
        with self._lock:
            if self._closed:
                return
            self._queue.put(task)
            self._grow()

    def is_here(self) -> bool:
        """Whether this thread is one of the pool's."""
        return _here.pool is self

    def change_waiting(self, by: int) -> None:
        """One thread more (1) or less (-1) waits. For `blocking`."""
        with self._lock:
            self._waiting += by
            if by > 0:
                self._grow()

    def counts(self) -> tuple[int, int]:
        """How many threads there are, and how many of them have nothing to do."""
        with self._lock:
            return len(self._threads), self._idle

    def close(self, timeout_s: float) -> None:
        """Let the queued tasks run, then end the threads; wait up to `timeout_s` for them. Idempotent."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
            for _ in threads:
                self._queue.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():
                join(thread, max(0.0, deadline - time.monotonic()))

    def _grow(self) -> None:
        """Start a thread if there is work that no idle one will take. Call it under the lock."""
        working = len(self._threads) - self._waiting
        if self._queue.qsize() > self._idle and working < self._size and not self._closed:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True)
            self._started += 1
            self._threads.add(thread)
            self._idle += 1
            try:
                thread.start()
            except RuntimeError as error:
                self._threads.discard(thread)
                self._idle -= 1
                finalizers.defer(partial(log.error, _NO_THREAD, error, self._queue.qsize(), len(self._threads)))

    def _work(self) -> None:
        _here.pool = _here.counter = self
        while True:
            task = self._queue.get()
            with self._lock:
                self._idle -= 1
                if task is None:
                    self._threads.discard(threading.current_thread())
                    return
                self._grow()  # what was put while this thread still seemed idle waits for another
            try:
                if self.around is None:
                    task()
                else:
                    self.around(task)
            except BaseException as error:
                log_error(log, "a handler thread's task failed", error=error)
                del error
            del task
            with self._lock:
                if len(self._threads) - self._waiting > self._size and self._queue.empty():
                    self._threads.discard(threading.current_thread())
                    return
                self._idle += 1


class _Watched:
    """What is told when a thread waits: `on_wait`, and what was told before."""

    def __init__(self, outer: _Counter | None, on_wait: Callable[[bool], None]) -> None:
        self._outer = outer
        self._on_wait = on_wait

    def change_waiting(self, by: int) -> None:
        """See `_Counter`."""
        if by > 0 and self._outer is not None:
            self._outer.change_waiting(by)
        try:
            self._on_wait(by > 0)
        finally:
            if by < 0 and self._outer is not None:
                self._outer.change_waiting(by)


class _Waiting:
    """The context of a waiting thread."""

    __slots__ = ("_counter",)

    def __init__(self, counter: _Counter) -> None:
        self._counter = counter

    def __enter__(self) -> None:
        self._counter.change_waiting(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._counter.change_waiting(-1)
