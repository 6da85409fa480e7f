"""The futures of asynchronous calls: genuine `torch.futures.Future` objects that can also be awaited."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zrpc.agent.pool import HandlerPool, blocking

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from zrpc.agent.call import Call
    from zrpc.wire.payload import Payload

T = TypeVar("T")
S = TypeVar("S")


class Future(torch.futures.Future[T]):
    """A `torch.futures.Future` that knows of handler threads and of asyncio.

    `wait` lets the handler pool know that its thread waits, so nested calls cannot use up the pool; `await future`
    works in any running event loop. A function given to `then` never runs on the reading thread: it may call and wait.
    """

    def wait(self) -> T:
        """The value, once it is there; raises what the call raised."""
        if self.done():
            return super().wait()
        with blocking():
            return super().wait()

    def then(self, callback: Callable[[torch.futures.Future[T]], S]) -> Future[S]:
        """A future for `callback(self)`, which runs once this one is done.

        A `RuntimeError` that `callback` raises is that future's error; any other becomes, as in torch, the cause of
        one.
        """
        if not callable(callback):
            super().then(callback)  # raises the TypeError that torch's own futures raise
        child: Future[S] = Future()

        def run(done: torch.futures.Future[T]) -> None:
            try:
                child.set_result(callback(done))
            except RuntimeError as error:
                fail(child, error)
            except Exception as error:
                fail(child, _callback_error(error))

        self.add_done_callback(run)
        return child

    def __await__(self) -> Generator[Any, None, T]:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def on_done(_: torch.futures.Future[T]) -> None:
            loop.call_soon_threadsafe(wake)

        self.add_done_callback(on_done)
        yield from waiter
        return super().wait()


def fail(future: torch.futures.Future[Any], error: Exception) -> None:
    """End `future` with `error`."""
    future.set_exception(error)


def _callback_error(error: Exception) -> RuntimeError:
    wrapped = RuntimeError(f"Got the following error when running the callback: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def future_of(call: Call, convert: Callable[[Payload], T], pool: HandlerPool) -> Future[T]:
    """A future for what `convert` makes of the answer to `call`; it is completed, and `convert` runs, on `pool`."""
    future: Future[T] = Future()

    def complete() -> None:
        try:
            value = convert(call.result())
        except Exception as error:
            fail(future, error)
        else:
            future.set_result(value)

    call.add_done_callback(lambda _: pool.submit(complete))
    return future
