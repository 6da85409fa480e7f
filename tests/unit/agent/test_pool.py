"""The handler pool: work gets a thread whenever fewer than `size` work, however many wait."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest

from zrpc import finalizers
from zrpc.agent.pool import HandlerPool, blocking

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 20.0


@contextmanager
def pool(size: int) -> Iterator[HandlerPool]:
    made = HandlerPool(size, "test-handler")
    try:
        yield made
    finally:
        made.close(WAIT_S)


def wait(event: threading.Event) -> None:
    assert event.wait(WAIT_S)


def test_tasks_run_on_threads_of_the_pool() -> None:
    names: list[str] = []
    done = threading.Event()
    with pool(1) as handlers:
        handlers.submit(lambda: names.append(threading.current_thread().name))
        handlers.submit(done.set)
        wait(done)
    assert names == ["test-handler-0"]


def test_as_many_tasks_run_at_once_as_the_pool_is_large() -> None:
    size = 4
    for _ in range(30):  # a thread may be missed in the moment between taking a task and saying so
        barrier = threading.Barrier(size + 1)
        with pool(size) as handlers:
            for _ in range(size):
                handlers.submit(lambda barrier=barrier: barrier.wait(WAIT_S) and None)  # type: ignore[misc]
            barrier.wait(WAIT_S)
            assert handlers.counts()[0] == size


def test_no_more_tasks_work_than_the_pool_is_large() -> None:
    lock, done = threading.Lock(), threading.Semaphore(0)
    at_work = most = 0
    with pool(3) as handlers:

        def task() -> None:
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            with lock:
                at_work -= 1
            done.release()

        for _ in range(300):
            handlers.submit(task)
        for _ in range(300):
            assert done.acquire(timeout=WAIT_S)
        assert handlers.counts()[0] <= 3
    assert most <= 3


def test_a_thread_that_waits_makes_room_for_another() -> None:
    asked, answered, done = threading.Event(), threading.Event(), threading.Event()
    with pool(1) as handlers:

        def outer() -> None:
            asked.set()
            with blocking():
                wait(answered)
            done.set()

        handlers.submit(outer)
        wait(asked)
        handlers.submit(answered.set)
        wait(done)


def test_work_that_is_queued_already_gets_a_thread_when_one_waits() -> None:
    queued, answered, done = threading.Event(), threading.Event(), threading.Event()
    with pool(1) as handlers:

        def outer() -> None:
            wait(queued)
            with blocking():
                wait(answered)
            done.set()

        handlers.submit(outer)
        handlers.submit(answered.set)
        queued.set()
        wait(done)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_nested_waits_of_any_depth_do_not_use_up_the_pool(size: int) -> None:
    depth = 40
    done = threading.Event()
    with pool(size) as handlers:

        def descend(level: int, above: threading.Event) -> None:
            if level < depth:
                below = threading.Event()
                handlers.submit(lambda: descend(level + 1, below))
                with blocking():
                    wait(below)
            above.set()

        handlers.submit(lambda: descend(0, done))
        wait(done)


def test_many_that_wait_side_by_side_do_not_use_up_the_pool() -> None:
    tasks = 30
    done = threading.Semaphore(0)
    with pool(2) as handlers:

        def ask() -> None:
            answered = threading.Event()
            handlers.submit(answered.set)
            with blocking():
                wait(answered)
            done.release()

        for _ in range(tasks):
            handlers.submit(ask)
        for _ in range(tasks):
            assert done.acquire(timeout=WAIT_S)


def test_threads_over_size_end() -> None:
    all_wait, answered, free = threading.Barrier(6), threading.Event(), threading.Semaphore(0)
    with pool(1) as handlers:

        def task() -> None:
            with blocking():
                all_wait.wait(WAIT_S)
                wait(answered)
            free.release()

        for _ in range(5):
            handlers.submit(task)
        all_wait.wait(WAIT_S)
        assert handlers.counts()[0] == 5
        threads = list(handlers._threads)
        answered.set()
        for _ in range(5):
            assert free.acquire(timeout=WAIT_S)
        _some_end(threads, 4)
        assert len([thread for thread in threads if thread.is_alive()]) == 1
        assert handlers.counts()[0] == 1


def _some_end(threads: list[threading.Thread], count: int) -> None:
    ended = threading.Semaphore(0)

    def join(thread: threading.Thread) -> None:
        thread.join(WAIT_S)
        ended.release()

    watchers = [threading.Thread(target=join, args=(thread,), daemon=True) for thread in threads]
    for watcher in watchers:
        watcher.start()
    for _ in range(count):
        assert ended.acquire(timeout=WAIT_S)


def test_a_task_that_fails_does_not_take_its_thread_along(caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()

    def fail(error: BaseException) -> None:
        raise error

    with pool(1) as handlers:
        for error in (ValueError("a"), SystemExit(1), KeyboardInterrupt()):
            handlers.submit(lambda error=error: fail(error))  # type: ignore[misc]
        handlers.submit(done.set)
        wait(done)
        assert handlers.counts()[0] == 1
    assert len(caplog.records) == 3


def test_work_waits_where_the_system_gives_no_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ran: SimpleQueue[int] = SimpleQueue()
    start, release = threading.Thread.start, threading.Event()
    with pool(2) as handlers:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        handlers.submit(lambda: ran.put(1))
        assert handlers.counts() == (0, 0)
        monkeypatch.setattr(threading.Thread, "start", start)
        handlers.submit(lambda: ran.put(2))
        assert [ran.get(timeout=WAIT_S), ran.get(timeout=WAIT_S)] == [1, 2]
        handlers.submit(lambda: wait(release))
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for number in (3, 4):
            handlers.submit(lambda number=number: ran.put(number))  # type: ignore[misc]
        release.set()
        assert {ran.get(timeout=WAIT_S), ran.get(timeout=WAIT_S)} == {3, 4}
    finalizers.run_pending()
    assert "(can't start new thread); tasks that wait: 1, threads that there are: 0." in caplog.messages[0]


def test_close_runs_what_is_queued_and_takes_no_more() -> None:
    ran: list[int] = []
    with pool(1) as handlers:
        for number in range(100):
            handlers.submit(lambda number=number: ran.append(number))  # type: ignore[misc]
        handlers.close(WAIT_S)
        assert ran == list(range(100))
        assert handlers.counts() == (0, 0)
        handlers.submit(lambda: ran.append(-1))
        handlers.close(WAIT_S)
    assert ran[-1] == 99


def test_close_does_not_wait_for_ever() -> None:
    release, closed = threading.Event(), threading.Event()
    with pool(4) as handlers:
        for _ in range(4):
            handlers.submit(lambda: wait(release))

        def close() -> None:
            handlers.close(0.01)
            closed.set()

        closer = threading.Thread(target=close)
        closer.start()
        wait(closed)  # the tasks still run
        release.set()
        closer.join()


def test_a_task_may_close_the_pool() -> None:
    done = threading.Event()
    with pool(1) as handlers:

        def close() -> None:
            handlers.close(WAIT_S)
            done.set()

        handlers.submit(close)
        wait(done)


def test_waiting_outside_of_a_pool_is_nobodys_business() -> None:
    with pool(1) as handlers, blocking(), blocking():
        handlers.submit(lambda: None)
        assert handlers._waiting == 0


def test_idle_threads_are_counted() -> None:
    release, running = threading.Event(), threading.Event()
    with pool(2) as handlers:
        assert handlers.counts() == (0, 0)

        def task() -> None:
            running.set()
            wait(release)

        handlers.submit(task)
        wait(running)
        assert handlers.counts() == (1, 0)
        release.set()
