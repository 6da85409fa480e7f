"""The event loop of a worker, without others."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from zrpc.agent.event_loop import EventLoop
from zrpc.agent.hooks import Hooks
from zrpc.agent.served import ServedCall, serving, serving_of
from zrpc.errors import AgentClosedError, CallCancelledError, LimitError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

WAIT_S = 20.0


class Outcome:
    """What comes of a coroutine."""

    def __init__(self) -> None:
        self._there = threading.Event()
        self._found: list[Any] = []

    def note(self, found: Any) -> None:
        self._found.append(found)
        self._there.set()

    def get(self) -> Any:
        assert self._there.wait(WAIT_S)
        assert len(self._found) == 1, "it is told once"
        return self._found[0]


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop(Hooks())
    yield made
    made.close(WAIT_S)


def run(loop: EventLoop, coroutine: Coroutine[Any, Any, Any], call: ServedCall | None = None) -> Outcome:
    outcome = Outcome()
    loop.run(coroutine, call, outcome.note, outcome.note)
    return outcome


async def answer(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def sleep(seconds: float = 1000.0) -> None:
    await asyncio.sleep(seconds)


async def fail(error: BaseException) -> None:
    raise error


def test_whatever_a_coroutine_raises_the_loop_goes_on(loop: EventLoop) -> None:
    for error in (ValueError("a"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()):
        assert run(loop, fail(error)).get() is error
    assert isinstance(run(loop, fail(asyncio.CancelledError())).get(), CallCancelledError)
    assert run(loop, answer(5)).get() == 5


def test_a_coroutine_is_cancelled_with_its_call_even_before_its_first_step(loop: EventLoop) -> None:
    early, late = ServedCall(0), ServedCall(0)
    early.cancel()
    first, second = run(loop, sleep(), early), run(loop, sleep(), late)
    late.cancel()
    assert isinstance(first.get(), CallCancelledError)
    assert isinstance(second.get(), CallCancelledError)


def test_a_coroutine_ends_when_its_time_is_over_though_nothing_tells_it(loop: EventLoop) -> None:
    """Its caller may be dead."""
    assert "time limit" in str(run(loop, sleep(), ServedCall(1)).get())


def test_a_coroutine_serves_the_call_of_the_thread_that_began_it(loop: EventLoop) -> None:
    async def served() -> ServedCall | None:
        await asyncio.sleep(0)
        return serving.get()

    call = ServedCall(0)
    with serving_of(call):
        found = run(loop, served())
    assert found.get() is call
    assert run(loop, served()).get() is None


def test_close_cancels_what_runs_and_refuses_what_comes() -> None:
    loop = EventLoop(Hooks())
    outcomes = [run(loop, sleep()) for _ in range(100)]
    loop.close(WAIT_S)
    assert all(isinstance(outcome.get(), CallCancelledError) for outcome in outcomes)
    with pytest.raises(AgentClosedError):
        run(loop, answer(1))
    loop.close(WAIT_S)


def test_where_the_system_gives_no_thread_the_call_fails_and_the_next_one_tries_again(
    loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _refuse)
        with pytest.raises(LimitError):
            run(loop, answer(1))
    assert run(loop, answer(1)).get() == 1


def _refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
