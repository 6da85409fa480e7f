"""What destructors leave to be done."""

from __future__ import annotations

import gc
import logging
import threading
from typing import TYPE_CHECKING

from tests.waiting import until
from zrpc import finalizers
from zrpc.control import ControlThread

if TYPE_CHECKING:
    import pytest

WAIT_S = 20.0


class Dropped:
    """Leaves something to be done when it is freed."""

    def __init__(self, done: list[str], name: str) -> None:
        self.done, self.name = done, name

    def __del__(self) -> None:
        finalizers.defer(lambda done=self.done, name=self.name: done.append(name))  # type: ignore[misc]


def test_a_destructor_only_leaves_its_task() -> None:
    done: list[str] = []
    Dropped(done, "a")
    Dropped(done, "b")
    assert done == []
    finalizers.run_pending()
    assert done == ["a", "b"]
    assert not finalizers.run_pending()


def test_a_task_that_raises_keeps_no_other_from_running(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fail() -> None:
        raise SystemExit("in a destructor's task")

    def run() -> None:
        finalizers.run_pending()

    finalizers.defer(fail)
    finalizers.defer(lambda: done.append("next"))
    thread = threading.Thread(target=run)
    with caplog.at_level(logging.ERROR, "zrpc"):
        thread.start()
        thread.join()
    assert done == ["next"]
    assert "in a destructor's task" in caplog.text


def test_the_control_thread_runs_what_was_deferred_in_order() -> None:
    done: list[str] = []
    control = ControlThread()
    control.start()
    for number in range(1000):
        Dropped(done, str(number))
    until(lambda: len(done) == 1000, "all are done", lambda: len(done))
    assert done == [str(number) for number in range(1000)]
    control.close(WAIT_S)


def test_what_garbage_collection_frees_anywhere_is_done() -> None:
    """The collector may run a destructor within any statement, under any lock that this thread holds."""
    done: list[str] = []
    control = ControlThread()
    control.start()
    for number in range(200):
        cycle = [Dropped(done, str(number))]
        cycle.append(cycle)  # type: ignore[arg-type]
    del cycle
    gc.collect()
    control.flush(WAIT_S)
    assert len(done) == 200
    control.close(WAIT_S)


def test_closing_runs_what_is_left() -> None:
    done: list[str] = []
    control = ControlThread()
    control.start()
    Dropped(done, "a")
    control.close(WAIT_S)
    assert done == ["a"]
