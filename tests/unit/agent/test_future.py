"""Futures of calls: torch's own, asyncio's, and those that `then` makes."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.unit.agent.test_call import ANSWER, Owner
from zrpc import finalizers, interrupts
from zrpc.agent.completions import Completions
from zrpc.agent.future import Future, fail, future_of
from zrpc.agent.pool import HandlerPool
from zrpc.errors import ZrpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.wire.payload import Payload

WAIT_S = 20.0


@contextmanager
def completer(*, read_by_caller: bool = False) -> Iterator[Completions]:
    made = Completions(lambda: read_by_caller)
    try:
        yield made
    finally:
        made.close(WAIT_S)


@contextmanager
def pool(size: int = 1) -> Iterator[HandlerPool]:
    made = HandlerPool(size, "handler")
    try:
        yield made
    finally:
        made.close(WAIT_S)


def text(payload: Payload) -> str:
    return bytes(payload.data).decode()


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        fail(future, value)
    else:
        future.set_result(value)
    return future


class Conversion:
    """Makes a text of an answer, and notes on which threads."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.ran = threading.Event()

    def __call__(self, payload: Payload) -> str:
        self.threads.append(threading.current_thread().name)
        self.ran.set()
        return text(payload)


def test_a_future_of_a_call_is_one_of_torch_and_converts_the_answer_on_a_completer() -> None:
    owner, convert = Owner(), Conversion()
    with completer() as completions:
        future = future_of(owner.call(), convert, completions)
        assert isinstance(future, torch.futures.Future)
        assert not future.done()
        owner.finish(ANSWER)
        assert convert.ran.wait(WAIT_S)
        assert future.wait() == "result"
        assert future.done()
        assert future.value() == "result"
    assert convert.threads == ["zrpc-completer-0"]


@pytest.mark.parametrize("ask", [Future.wait, Future.done])
def test_what_a_reading_caller_brought_is_completed_by_who_asks_for_it(ask: Callable[[Future[str]], object]) -> None:
    owner, convert = Owner(), Conversion()
    with completer(read_by_caller=True) as completions:
        future = future_of(owner.call(), convert, completions)
        owner.finish(ANSWER)
        assert ask(future)
        assert future.value() == "result"
        completions.catch_up()  # finds nothing to do
    assert convert.threads == [threading.current_thread().name]


def test_what_a_reading_caller_left_is_completed_by_a_completer() -> None:
    owner, convert = Owner(), Conversion()
    with completer(read_by_caller=True) as completions:
        future = future_of(owner.call(), convert, completions)
        owner.finish(ANSWER)
        assert not convert.threads
        completions.catch_up()
        assert convert.ran.wait(WAIT_S)
        assert future.wait() == "result"
    assert convert.threads == ["zrpc-completer-0"]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_callback_never_waits_for_somebody_to_ask(is_late: bool) -> None:
    owner = Owner()
    with completer(read_by_caller=True) as completions:
        future = future_of(owner.call(), text, completions)
        called = threading.Event()
        if is_late:
            owner.finish(ANSWER)
        future.add_done_callback(lambda _: called.set())
        if not is_late:
            owner.finish(ANSWER)
        assert called.wait(WAIT_S)


def test_a_future_left_lying_is_completed_when_its_worker_closes() -> None:
    owner = Owner()
    with completer(read_by_caller=True) as completions:
        future = future_of(owner.call(), text, completions)
        owner.finish(ANSWER)
    assert torch.futures.Future.done(future)


def test_errors_of_the_call_and_of_the_conversion_are_the_futures() -> None:
    for convert, error in ((text, KeyError("remote")), (lambda payload: 1 // len(payload.data[:0]), None)):
        owner = Owner()
        with completer() as completions:
            future = future_of(owner.call(), convert, completions)
            owner.finish(None if error else ANSWER, error)
            with pytest.raises(KeyError if error else ZeroDivisionError):
                future.wait()
            assert future.done()
            with pytest.raises(KeyError if error else ZeroDivisionError):
                future.value()


def test_then_chains_values_and_may_wait_for_calls() -> None:
    first, second = Owner(), Owner()
    with completer() as completions:
        one = future_of(first.call(), text, completions)
        two = future_of(second.call(), text, completions)
        both = one.then(lambda future: future.wait() + two.wait()).then(lambda future: future.value() + "!")
        assert isinstance(both, Future)
        first.finish(ANSWER)  # the only completer now waits for the second, and another one is started
        second.finish(ANSWER)
        assert both.wait() == "resultresult!"


def test_then_of_a_done_future_runs_at_once() -> None:
    assert done(2).then(lambda future: future.value() * 3).wait() == 6


def test_then_hands_errors_on_as_torch_does() -> None:
    failed = done(ValueError("first"))
    with pytest.raises(RuntimeError, match="ValueError: first") as caught:
        failed.then(lambda future: future.wait()).wait()
    assert isinstance(caught.value.__cause__, ValueError)

    def raise_own(_: object) -> None:
        raise NotImplementedError("of the callback")

    with pytest.raises(NotImplementedError, match="of the callback"):
        done(1).then(raise_own).wait()
    assert failed.then(lambda _: "recovered").wait() == "recovered"


@pytest.fixture
def deferring() -> Iterator[None]:
    """Signal handlers are deferred, as they are once `init_rpc` was called."""
    interrupts.install()
    yield
    interrupts.uninstall()


@pytest.mark.usefixtures("deferring")
def test_a_signal_that_comes_while_the_outcome_is_made_is_handled_after_and_loses_nothing() -> None:
    def interrupted(_: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "made"

    owner = Owner()
    with completer(read_by_caller=True) as completions:
        future = future_of(owner.call(), interrupted, completions)
        owner.finish(ANSWER)
        with pytest.raises(KeyboardInterrupt):
            future.wait()
        assert future.wait() == "made"


def test_what_a_function_raises_is_no_interrupt_of_the_thread_that_waits() -> None:
    def interrupting(_: object) -> str:
        raise KeyboardInterrupt("of the function")

    owner = Owner()
    with completer(read_by_caller=True) as completions:
        future = future_of(owner.call(), interrupting, completions)
        owner.finish(ANSWER)
        with pytest.raises(ZrpcError, match="KeyboardInterrupt: of the function was raised while it was made"):
            future.wait()
        origin: Future[int] = Future()
        child = origin.then(lambda _: sys.exit(1))
        completions.submit(lambda: origin.set_result(1))
        with pytest.raises(ZrpcError, match="SystemExit: 1 was raised"):
            child.wait()


def test_then_wants_a_function() -> None:
    with pytest.raises(TypeError):
        done(1).then(None)  # type: ignore[arg-type]


def test_add_done_callback_runs_on_a_completer() -> None:
    owner = Owner()
    ran: list[str] = []
    with completer() as completions:
        future = future_of(owner.call(), text, completions)
        finished = threading.Event()

        def callback(_: object) -> None:
            ran.append(threading.current_thread().name)
            finished.set()

        future.add_done_callback(callback)
        owner.finish(ANSWER)
        assert finished.wait(WAIT_S)
    assert ran == ["zrpc-completer-0"]


def test_torchs_functions_over_many_futures_work() -> None:
    owners = [Owner() for _ in range(4)]
    with completer() as completions:
        futures = [future_of(owner.call(), text, completions) for owner in owners]
        collected = torch.futures.collect_all(futures)  # type: ignore[arg-type]
        for owner in owners:
            owner.finish(ANSWER)
        assert torch.futures.wait_all(futures) == ["result"] * 4  # type: ignore[arg-type]
        assert [future.wait() for future in collected.wait()] == ["result"] * 4
    with pytest.raises(KeyError):
        torch.futures.wait_all([done(1), done(KeyError("x"))])


def test_futures_can_be_awaited() -> None:
    owners = [Owner() for _ in range(3)]

    async def main() -> list[str]:
        with completer() as completions:
            futures = [future_of(owner.call(), text, completions) for owner in owners]
            loop = asyncio.get_running_loop()
            for owner in owners:
                await loop.run_in_executor(None, owner.finish, ANSWER)

            async def one(future: Future[str]) -> str:
                return await future

            return await asyncio.gather(*map(one, futures))

    assert asyncio.run(main()) == ["result"] * 3


def test_await_raises_what_the_call_raised_and_gives_what_is_done() -> None:
    async def main() -> None:
        assert await done(5) == 5
        with pytest.raises(KeyError):
            await done(KeyError("x"))

    asyncio.run(main())


def test_the_loop_runs_while_a_future_is_awaited_and_a_cancelled_wait_leaves_it_alone() -> None:
    owner = Owner()

    async def main() -> None:
        with completer() as completions:
            future = future_of(owner.call(), text, completions)

            async def wait() -> str:
                return await future

            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            again = asyncio.create_task(wait())
            await asyncio.sleep(0)
            owner.finish(ANSWER)
            assert await again == "result"

    asyncio.run(main())


def test_waiting_makes_room_in_the_pool() -> None:
    answered: Future[int] = Future()
    asked, finished = threading.Event(), threading.Event()
    with pool() as handlers:

        def ask() -> None:
            asked.set()
            assert answered.wait() == 4
            finished.set()

        handlers.submit(ask)
        assert asked.wait(WAIT_S)
        handlers.submit(lambda: answered.set_result(4))
        assert finished.wait(WAIT_S)


# ---- failures that nobody asks about ---------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    finalizers.run_pending()
    return [record.getMessage() for record in caplog.records if record.name == "zrpc"]


def test_a_failed_call_whose_future_is_dropped_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner()
    with completer() as completions:
        future_of(owner.call(), text, completions)
        owner.finish(None, KeyError("remote"))
    (warning,) = warnings_of(caplog)
    assert warning.startswith("RRefUserDelete to ")
    assert warning.endswith("failed, and nobody asked for its outcome: KeyError: 'remote'")


def test_a_callback_that_failed_and_a_failed_conversion_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    done(1).then(lambda _: 1 // 0)
    gc.collect()  # the callback ran within then(), whose frame has the future
    (warning,) = warnings_of(caplog)
    assert warning.startswith("a callback given to then() failed, and nobody asked")
    assert "ZeroDivisionError" in warning
    owner = Owner()
    with completer() as completions:
        future_of(owner.call(), lambda payload: 1 // 0, completions)
        owner.finish(ANSWER)
    assert len(warnings_of(caplog)) == 2


def wait(future: Future[Any]) -> None:
    with pytest.raises(KeyError):
        future.wait()


def value(future: Future[Any]) -> None:
    with pytest.raises(KeyError):
        future.value()


def chain(future: Future[Any]) -> None:
    future.then(lambda failed: 1)


def call_back(future: Future[Any]) -> None:
    future.add_done_callback(lambda failed: None)


def wait_all(future: Future[Any]) -> None:
    with pytest.raises(KeyError):
        torch.futures.wait_all([done(1), future])


def collect_all(future: Future[Any]) -> None:
    with pytest.raises(KeyError):
        torch.futures.collect_all([future, done(1)]).wait()


def await_it(future: Future[Any]) -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            await future

    asyncio.run(main())


@pytest.mark.parametrize("ask", [wait, value, chain, call_back, wait_all, collect_all, await_it])
def test_a_failure_that_somebody_asked_about_is_not_logged(
    ask: Callable[[Future[Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    ask(done(KeyError("seen")))
    gc.collect()
    assert warnings_of(caplog) == []


def test_values_and_futures_under_way_are_dropped_silently(caplog: pytest.LogCaptureFixture) -> None:
    done(1)
    Future[int]()
    assert warnings_of(caplog) == []


def test_a_failed_future_is_freed_with_all_that_its_error_went_through() -> None:
    def fail_and_wait() -> weakref.ref[Future[Any]]:
        future = done(1).then(lambda _: 1 // 0)
        with pytest.raises(RuntimeError):
            future.wait()
        return weakref.ref(future)

    held = fail_and_wait()
    gc.collect()
    assert held() is None


def test_an_error_outlives_the_future_where_torch_still_has_it() -> None:
    collected = torch.futures.collect_all([done(1), done(KeyError("kept"))])
    gc.collect()
    for _ in range(2):
        with pytest.raises(KeyError, match="kept"):
            collected.wait()


def test_only_exceptions_are_errors() -> None:
    with pytest.raises(AssertionError, match="not an Exception"):
        Future[int]().set_exception(3)


def test_the_traceback_of_a_failure_does_not_grow_with_those_who_ask() -> None:
    future = done(ValueError("x"))
    lengths = set()
    for _ in range(50):
        with pytest.raises(ValueError, match="x") as caught:
            future.wait()
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1
