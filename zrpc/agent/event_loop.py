"""The event loop of a worker, where `async def` functions run that others call.

What: one thread, started with the first such call. Each call is a task. Its coroutine is made on a handler thread,
which reads the arguments; its result is pickled and sent on the loop's thread.

Invariants: a coroutine goes on in the autograd context of its call, whatever other tasks do meanwhile: the context is
entered for each step. No error of a coroutine ends the loop.

Threads: `run` and `close` from any; the lock owns `_loop` and `_thread`. All else belongs to the loop's thread.

Failure: where the system gives no thread, the call fails with `LimitError`, and the next one tries again.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from functools import partial
from types import coroutine as generator_coroutine
from typing import TYPE_CHECKING, Any

from zrpc import threads
from zrpc.errors import AgentClosedError, CallCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from zrpc.agent.hooks import Hooks
    from zrpc.agent.served import ServedCall
    from zrpc.errors import ZrpcError


GRACE_S = 0.1
"""A caller that lives cancels the call itself when its time is over, with what it knows of the reason."""


class EventLoop:
    """One event loop on a thread of its own.

    Args:
        hooks: say in which contexts calls are made.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is self._thread

    def run(
        self, coroutine: Coroutine[Any, Any, Any], call: ServedCall | None,
        on_value: Callable[[Any], None], on_error: Callable[[BaseException], None],
    ) -> Callable[[], None]:  # fmt: skip
        """Run `coroutine` in the contexts of this thread, and tell what came of it, on the loop's thread.

        Args:
            coroutine: what to run.
            call: the call that it serves: it is cancelled with it, and when its time is over.
            on_value: is given its result.
            on_error: is given what it or `on_value` raised: `CallCancelledError` if it was cancelled.

        Returns:
            Cancels it, from any thread.

        Raises:
            LimitError: the system gives no thread.
            AgentClosedError: this worker shuts down.
        """
        try:
            contexts = self._hooks.carry_over()
            loop = self._started()
            run = _Run(coroutine, call, on_value, on_error)
            steps = _in_contexts(coroutine, self._hooks, contexts) if contexts else coroutine
            loop.call_soon_threadsafe(partial(self._start, run, steps, None if call is None else call.left_s()))
        except BaseException:
            coroutine.close()
            raise

        def cancel() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(run.cancel)

        if call is not None:
            call.when_cancelled(cancel)
        return cancel

    def close(self, timeout_s: float) -> None:
        """Cancel what runs, and end the thread; wait up to `timeout_s` for it. Idempotent."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        with suppress(RuntimeError):  # it is closed already
            loop.call_soon_threadsafe(loop.stop)
        if threading.current_thread() is not thread:
            threads.join(thread, timeout_s)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise AgentClosedError("this worker shuts down")
            if self._loop is None:
                loop = asyncio.new_event_loop()
                try:
                    self._thread = threads.start(partial(_run, loop), "zrpc-event-loop")
                except BaseException:
                    loop.close()
                    raise
                self._loop = loop
            return self._loop

    def _start(self, run: _Run, steps: Coroutine[Any, Any, Any], left_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        task = run.begin(loop, steps)
        self._tasks.add(task)  # the loop keeps none
        task.add_done_callback(self._tasks.discard)
        if left_s is not None:
            timer = loop.call_later(left_s + GRACE_S, run.cancel)
            task.add_done_callback(lambda _: timer.cancel())


class _Run:
    """One coroutine under way. It belongs to the loop's thread."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], call: ServedCall | None, on_value: Callable[[Any], None],
        on_error: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._coroutine = coroutine
        self._call = call
        self._on_value = on_value
        self._on_error = on_error
        self._task: asyncio.Task[None] | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, steps: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        """Run `steps`, which are those of the coroutine, as a task."""
        self._task = loop.create_task(self._serve(steps))
        self._task.add_done_callback(self._on_done)
        return self._task

    def cancel(self) -> None:
        """Have the coroutine see a `CancelledError`, unless it is over."""
        if self._task is not None:
            self._task.cancel()

    async def _serve(self, steps: Coroutine[Any, Any, Any]) -> None:
        try:
            outcome = [await steps]
            self._on_value(outcome.pop())  # no name refers to the result: see `serve_python`
        except asyncio.CancelledError:
            self._on_error(self._cancelled())
        except BaseException as error:
            self._on_error(error)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():  # before its first step
            self._coroutine.close()
            self._on_error(self._cancelled())
        self._on_value = self._on_error = _forget  # they refer to the call, which may refer to this

    def _cancelled(self) -> ZrpcError:
        over = None if self._call is None else self._call.over()
        return over or CallCancelledError("the function was cancelled at its worker, while it ran or before it began")


def _forget(_: object) -> None:
    """It is over."""


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """The loop's thread."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(asyncio.sleep(0))  # what was handed over before begins
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


@generator_coroutine
def _in_contexts(coroutine: Coroutine[Any, Any, Any], hooks: Hooks, contexts: list[Any]) -> Generator[Any, Any, Any]:
    """`coroutine`, each step of which runs in what `hooks` carry over from the one before."""
    step, value = coroutine.send, None
    while True:
        failure: BaseException | None = None
        with hooks.carried_over(contexts):  # no error passes through it: see `Request.run`
            try:
                waited = step(value)
            except BaseException as raised:
                failure = raised
            contexts = hooks.carry_over()
        if isinstance(failure, StopIteration):
            return failure.value
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        try:
            step, value = coroutine.send, (yield waited)
        except BaseException as thrown:
            step, value = coroutine.throw, thrown
