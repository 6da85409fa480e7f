"""The futures of asynchronous calls: genuine `torch.futures.Future` objects that can also be awaited.

A future that failed and goes without anybody having asked for its outcome says so in the log.

The traceback of an error leads to the frames that it went through, and from there to the future. Were the error held
by the C++ part of the future, where the garbage collector sees no cycles, neither would ever be freed. So the Python
part holds it, and the C++ part a `Token` that knows where to find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zrpc import finalizers, interrupts
from zrpc.agent.pool import blocking
from zrpc.agent.served import serving, serving_of
from zrpc.errors import CallCancelledError, ZrpcError
from zrpc.exception_text import cause_of, context_of, describe, is_interrupt, without_traceback
from zrpc.staging import handover
from zrpc.wire.exceptions import remote_traceback
from zrpc.wire.raisable import Raisable, copy_exception

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from zrpc.agent.call import Call
    from zrpc.agent.completions import Completions
    from zrpc.agent.served import ServedCall
    from zrpc.staging.streams import Mark
    from zrpc.wire.payload import Payload

T = TypeVar("T")
S = TypeVar("S")

log = logging.getLogger("zrpc")


class Failure:
    """The error of a future that failed, and whether anybody has seen it."""

    __slots__ = ("__weakref__", "error", "raisable", "seen")

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.raisable = Raisable(error)
        self.seen = False


class Token:
    """What the C++ part of a failed future has for a value. It may outlive the Python part."""

    __slots__ = ("_error", "_failure")

    def __init__(self, failure: Failure) -> None:
        self._failure = weakref.ref(failure)
        self._error: Exception = RuntimeError("the future failed, and is gone")

    def take(self, error: Exception) -> None:
        """The Python part goes: from now on the token holds the error, without the ways back."""
        links: list[BaseException] = [error]
        seen: set[int] = set()
        while links:
            link = without_traceback(links.pop())
            seen.add(id(link))
            links += [one for one in (cause_of(link), context_of(link)) if one is not None and id(one) not in seen]
        self._error = error

    def raise_error(self) -> None:
        """For C++, which calls it for whoever asks for the outcome, `torch.futures.wait_all` included."""
        failure = self._failure()
        if failure is None:
            raise copy_exception(self._error)
        failure.seen = True
        raise failure.raisable.take()


class Origin:
    """The call that a future is of, for the log. It does not keep the call's answer."""

    __slots__ = ("_message_type", "_peer")

    def __init__(self, call: Call) -> None:
        self._message_type = type(call.message)
        self._peer = call.peer

    def __str__(self) -> str:
        return f"{self._message_type.__name__} to {self._peer}"


class Future(torch.futures.Future[T]):
    """A `torch.futures.Future` that knows of handler threads and of asyncio.

    `wait` lets the handler pool know that its thread waits, so nested calls cannot use up the pool; `await future`
    works in any running event loop. A function given to `then` never runs on the reading thread: it may call and wait.

    Attributes:
        origin: what the value comes of, for the log.
    """

    origin: object = "an asynchronous call"
    _answer: Answer | None = None
    _canceller: Callable[[], bool] | None = None
    _is_cancelled = False
    _failure: Failure | None = None
    _token: Token | None = None
    _mark: Mark | None = None
    _has_callback = False

    @interrupts.uninterrupted
    def __del__(self) -> None:
        failure, token = self._failure, self._token
        if failure is None or token is None or sys.is_finalizing():
            return
        if not failure.seen and not self._has_callback and not isinstance(failure.error, CallCancelledError):
            finalizers.defer(partial(_warn, self.origin, failure.error))
        failure.raisable.drop_traceback()
        token.take(failure.error)

    def cancel(self) -> bool:
        """Call off the remote call that this future waits for, unless it is done.

        The future then ends with `CallCancelledError`. The callee does not begin the call if it has not yet; a function
        that runs may ask `zrpc.is_cancelled()`, and an `async def` function gets an `asyncio.CancelledError`. What they
        have called meanwhile is cancelled too. A future that `then` gave cancels the one that it was made of.

        Returns:
            Whether it was cancelled by this. False: it is done already, or waits for no call.
        """
        answer, canceller = self._answer, self._canceller
        if answer is not None:
            return answer.cancel()
        return canceller is not None and not self.done() and canceller()

    def cancelled(self) -> bool:
        """Whether it ended because it, or the call that it is of, was cancelled."""
        failure = self._failure if self.done() else None
        return failure is not None and isinstance(failure.error, CallCancelledError)

    def cancel_by(self, canceller: Callable[[], bool]) -> None:
        """`cancel` calls `canceller`, which says whether it did anything."""
        self._canceller = canceller

    def follow(self, source: torch.futures.Future[Any]) -> None:
        """What cancels this future cancels `source`, which it waits for. `source` is not kept by that."""
        if isinstance(source, Future):
            self._canceller = partial(_cancel, weakref.ref(source))

    def set_origin(self, origin: object) -> None:
        """Have the log say that `origin` failed, if this future does."""
        self.origin = origin

    def set_exception(self, result: Any) -> None:
        """End with the error `result`. It is logged if nobody ever asks for the outcome."""
        if not isinstance(result, Exception):
            super().set_exception(result)  # raises what torch's own futures raise
            return
        self._failure = Failure(result)
        self._token = Token(self._failure)
        super()._set_unwrap_func(Token.raise_error)
        super().set_result(self._token)  # type: ignore[arg-type]  # to C++ it is a value

    def done(self) -> bool:
        """Whether the outcome is here."""
        answer = self._answer
        if answer is not None and answer.is_here:
            answer.complete()
        return super().done()

    def add_done_callback(self, callback: Callable[[torch.futures.Future[T]], None]) -> None:
        """Call `callback(self)` once this future is done. From now on its outcome is the callback's business."""
        self._has_callback = True
        super().add_done_callback(callback)
        answer = self._answer
        if answer is not None and answer.is_here:
            answer.complete_soon()

    def wait(self) -> T:
        """The value, once it is there; raises what the call raised."""
        answer = self._answer
        if answer is not None:
            answer.wait()
        if not super().done():
            with blocking():
                self._await_done()
        value = super().wait()
        if self._mark is not None:
            self._mark.join()
        return value

    def _await_done(self) -> None:
        """Wait, and let signal handlers run meanwhile: torch's own `wait` does not."""
        done = threading.Event()
        super().add_done_callback(lambda _: done.set())
        done.wait()

    def value(self) -> T:
        """The value of a future that is done; raises what the call raised."""
        value = super().value()
        if self._mark is not None:
            self._mark.join()
        return value

    def then(self, callback: Callable[[torch.futures.Future[T]], S]) -> Future[S]:
        """A future for `callback(self)`, which runs once this one is done.

        A `RuntimeError` that `callback` raises is that future's error; any other becomes, as in torch, the cause of
        one.
        """
        if not callable(callback):
            super().then(callback)  # raises the TypeError that torch's own futures raise
        child: Future[S] = Future()
        child.set_origin("a callback given to then()")
        child.follow(self)
        served = serving.get()
        held = [child]
        if handover.streams is not None:
            callback = _after(handover.streams.mark(), callback)
        if served is not None:
            callback = _serving(served, callback)
        self.add_done_callback(lambda done: settle(held.pop(), lambda: _called_back(callback, done)))
        return child

    def __await__(self) -> Generator[Any, None, T]:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def on_done(_: torch.futures.Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(on_done)
        try:
            yield from waiter
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.wait()


def _warn(origin: object, error: Exception) -> None:
    remote = remote_traceback(error)
    where = f"\n{remote}" if remote is not None else ""
    log.warning("%s failed, and nobody asked for its outcome: %s%s", origin, describe(error), where)


def fail(future: torch.futures.Future[Any], error: Exception) -> None:
    """End `future` with `error`."""
    future.set_exception(error)


def settle(future: torch.futures.Future[T], make: Callable[[], T]) -> None:
    """End `future` with what `make` returns or raises. What interrupts this thread, as Ctrl-C does, is raised here too.

    The error's traceback keeps the frames of this function and its callers. If none of them still has the future, it
    goes as soon as the program drops it, and need not wait for the garbage collector to say that it failed.
    """
    try:
        value = make()
    except Exception as error:
        fail(future, error)
        del future
    except BaseException as failure:
        fail(future, ZrpcError(f"the outcome was lost: {describe(failure)} was raised while it was made"))
        if is_interrupt(failure):
            raise
    else:
        if handover.streams is not None and isinstance(future, Future):
            future._mark = handover.streams.mark()
        future.set_result(value)


def _after(mark: Mark, callback: Callable[[torch.futures.Future[T]], S]) -> Callable[[torch.futures.Future[T]], S]:
    """`callback`, to be run after what this thread has given to devices: it may use tensors that it found here."""

    def joined(done: torch.futures.Future[T]) -> S:
        mark.join()
        return callback(done)

    return joined


def _serving(
    call: ServedCall, callback: Callable[[torch.futures.Future[T]], S]
) -> Callable[[torch.futures.Future[T]], S]:
    """`callback`, which goes on with what this thread serves."""

    def going_on(done: torch.futures.Future[T]) -> S:
        with serving_of(call):
            return callback(done)

    return going_on


def _cancel(future: weakref.ref[Future[Any]]) -> bool:
    found = future()
    return found is not None and found.cancel()


def _called_back(callback: Callable[[torch.futures.Future[T]], S], done: torch.futures.Future[T]) -> S:
    try:
        return callback(done)
    except RuntimeError:
        raise
    except Exception as error:
        raise RuntimeError(f"Got the following error when running the callback: {describe(error)}") from error


class Answer:
    """The answer that a future waits for, and what it is made of. It completes the future, once.

    Args:
        future: to be completed; held until then, so it may be dropped by everybody else.
        call: what is answered.
        convert: makes the future's value.
        completions: who completes it if nobody waits.
    """

    __slots__ = ("_call", "_completions", "_convert", "_held")

    def __init__(
        self, future: Future[T], call: Call, convert: Callable[[Payload], T], completions: Completions
    ) -> None:
        self._held: list[Future[Any]] = [future]
        self._call = call
        self._convert = convert
        self._completions = completions

    @property
    def is_here(self) -> bool:
        """Whether the call is done, and nobody has taken it on to complete the future."""
        return bool(self._held) and self._call.done()

    @property
    def is_taken(self) -> bool:
        """See `Completion.is_taken`."""
        return not self._held

    def wait(self) -> None:
        """Wait for the call, and complete the future; or leave as soon as somebody else does."""
        if self._held:
            self._call.await_done()
            self.complete()

    def complete(self) -> None:
        """Complete the future, unless somebody does."""
        with interrupts.held:  # else what a signal handler raises would be lost, or leave the future without an end
            try:
                future = self._held.pop()
            except IndexError:
                return
            future._answer = None
            call, convert = self._call, self._convert
            held = [future]
            del future
            settle(held.pop(), lambda: convert(call.result()))

    def cancel(self) -> bool:
        """See `Future.cancel`."""
        return self._call.cancel()

    def complete_soon(self) -> None:
        """The same on a completer thread."""
        self._completions.submit(self.complete)

    def on_done(self, _: Call) -> None:
        """The call is done."""
        held = self._held
        if held:
            self._completions.add(self, soon=held[0]._has_callback)


def future_of(call: Call, convert: Callable[[Payload], T], completions: Completions) -> Future[T]:
    """A future for what `convert` makes of the answer to `call`.

    It is completed, and `convert` runs, on the thread that waits for it, or else on one of `completions`.
    """
    future: Future[T] = Future()
    future.origin = Origin(call)
    answer = future._answer = Answer(future, call, convert, completions)
    call.add_done_callback(answer.on_done, inline=True)
    return future
