"""Threads that cannot be started, and loops whose steps fail."""

from __future__ import annotations

import logging
import threading

import pytest

from zrpc import threads
from zrpc.errors import LimitError

WAIT_S = 20.0


def test_a_thread_that_is_refused_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(LimitError, match=r"zrpc-x cannot be started .*ulimit -u"):
        threads.start(lambda: None, "zrpc-x")


def test_a_loop_goes_on_after_a_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "RETRY_PAUSE_S", 0.0)
    steps = iter([None, ValueError("a"), KeyboardInterrupt("b"), None])
    done = threading.Event()

    def step() -> None:
        error = next(steps, StopIteration)
        if error is StopIteration:
            done.set()
        elif error is not None:
            raise error  # type: ignore[misc]

    with caplog.at_level(logging.ERROR, "zrpc"):
        thread = threads.start(lambda: threads.keep_running(step, done.is_set), "zrpc-loop")
        assert done.wait(WAIT_S)
        assert threads.join(thread, WAIT_S)
    assert caplog.text.count("the thread zrpc-loop goes on after an unexpected error") == 2
