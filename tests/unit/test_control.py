"""The control thread: tasks in order, and time limits."""

from __future__ import annotations

import logging
import signal
import threading
import time

import pytest

from zrpc.control import ControlThread
from zrpc.errors import LimitError

WAIT_S = 20.0


def test_tasks_run_in_order_on_one_thread() -> None:
    control = ControlThread()
    control.start()
    ran: list[tuple[int, str]] = []
    for number in range(1000):
        control.submit(lambda number=number: ran.append((number, threading.current_thread().name)))  # type: ignore[misc]
    control.flush(WAIT_S)
    assert ran == [(number, "zrpc-control") for number in range(1000)]
    control.close(WAIT_S)


def test_a_task_that_raises_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    control = ControlThread()
    control.start()
    done = threading.Event()

    def fail() -> None:
        raise KeyboardInterrupt("of a task")

    with caplog.at_level(logging.ERROR, "zrpc"):
        control.submit(fail)
        control.submit(done.set)
        assert done.wait(WAIT_S)
    assert "of a task" in caplog.text
    control.close(WAIT_S)


def test_timers_that_raise_are_logged_and_tasks_run(caplog: pytest.LogCaptureFixture) -> None:
    fails = iter([True, False])

    def run_timers() -> None:
        if next(fails, False):
            raise ValueError("of a timer")

    control = ControlThread(run_timers)
    with caplog.at_level(logging.ERROR, "zrpc"):
        control.start()
        control.flush(WAIT_S)
    assert "of a timer" in caplog.text
    control.close(WAIT_S)


def test_timers_run_when_they_are_due() -> None:
    due = threading.Event()
    start = time.monotonic()

    def run_timers() -> float | None:
        left_s = start + 0.05 - time.monotonic()
        if left_s <= 0:
            due.set()
            return None
        return left_s

    control = ControlThread(run_timers)
    control.start()
    assert due.wait(WAIT_S)
    assert time.monotonic() - start >= 0.05
    control.close(WAIT_S)


def test_a_signal_handler_may_submit_where_it_interrupts_submitting() -> None:
    control = ControlThread()
    control.start()
    ran: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda *_: control.submit(lambda: ran.append(1)))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(20_000):
            control.submit(lambda: ran.append(0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    control.flush(WAIT_S)
    assert ran.count(0) == 20_000
    assert 1 in ran
    control.close(WAIT_S)


def test_where_there_is_no_thread_to_be_had_nothing_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    control = ControlThread()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(LimitError, match=r"zrpc-control cannot be started .*can.t start new thread.*ulimit -u"):
            control.start()
    control.flush(0.0)
    control.close(0.0)


def test_a_task_may_close_it() -> None:
    control = ControlThread()
    control.start()
    closed = threading.Event()

    def close() -> None:
        control.close(WAIT_S)
        closed.set()

    control.submit(close)
    assert closed.wait(WAIT_S)
