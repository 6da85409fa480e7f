"""One request being served, as its handler sees it."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from zrpc.agent.pool import blocking
from zrpc.agent.served import ServedCall
from zrpc.exception_text import log_error
from zrpc.wire.messages import Message
from zrpc.wire.payload import Payload, open_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.agent.event_loop import EventLoop
    from zrpc.agent.hooks import CallHook, Hooks
    from zrpc.ids import Incarnation, WorkerInfo
    from zrpc.wire.envelope import Buffer, Envelope
    from zrpc.wire.route import Stager

M = TypeVar("M", bound=Message)

log = logging.getLogger("zrpc")

_nothing = nullcontext()


class AsyncCalls:
    """Counts functions marked with `async_execution` that have returned a future which is not done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num = 0

    @property
    def num(self) -> int:
        """How many there are now."""
        return self._num

    def change(self, by: int) -> None:
        """One more (1), or one less (-1)."""
        with self._lock:
            self._num += by


class Answerer(Protocol):
    """What a request needs of its agent."""

    hooks: Hooks
    async_calls: AsyncCalls
    event_loop: EventLoop

    @property
    def staging(self) -> Stager:
        """What brings tensors to devices."""

    def answer(self, request: Request[Message], payload: Payload | None, error: BaseException | None) -> None:
        """Send the answer."""

    def is_serving(self, source: Incarnation, call_id: int) -> bool:
        """Whether that request is here, and not answered yet."""


class Traced:
    """Answers as `answerer` does, and tells `on_answer` of each answer before. Any thread may use it."""

    def __init__(self, answerer: Answerer, on_answer: Callable[[Request[Any], BaseException | None], None]) -> None:
        self._answerer = answerer
        self._on_answer = on_answer
        self.hooks, self.async_calls, self.event_loop = answerer.hooks, answerer.async_calls, answerer.event_loop

    @property
    def staging(self) -> Stager:
        """See `Answerer.staging`."""
        return self._answerer.staging

    def answer(self, request: Request[Message], payload: Payload | None, error: BaseException | None) -> None:
        """See `Answerer.answer`."""
        self._on_answer(request, error)
        self._answerer.answer(request, payload, error)

    def is_serving(self, source: Incarnation, call_id: int) -> bool:
        """See `Answerer.is_serving`."""
        return self._answerer.is_serving(source, call_id)


class Request(ServedCall, Generic[M]):
    """A request of `source`. It is answered once, by `reply` or `fail`, from any thread.

    Attributes:
        key: the life of the caller, and the number that it gave to the request.
        is_of_users: it is a call of users, which may be cancelled.
        answered: whether it is answered.
    """

    __slots__ = (
        "_answerer", "_envelope", "_payload", "answered", "call_id", "extras", "is_of_users", "key", "message",
        "source",
    )  # fmt: skip

    def __init__(self, answerer: Answerer, source: WorkerInfo, envelope: Envelope, message: M) -> None:
        super().__init__(envelope.time_left_ms)
        self.is_of_users = envelope.time_left_ms is not None
        self.key: tuple[Incarnation, int] = (source.incarnation, envelope.call_id)
        self._answerer = answerer
        self._envelope: Envelope | None = envelope
        self._payload: Payload | None = None
        self.source = source
        self.message = message
        self.call_id = envelope.call_id
        self.extras = envelope.extras
        self.answered = False

    @property
    def payload(self) -> Payload:
        """What rides beside the message.

        Raises:
            ProtocolError: its tensor table is damaged, or the caller was interrupted before it had written all of it.
            PeerLostError: the caller is lost, and had not written all of it.
            AgentClosedError: the same, but this worker shuts down.
            DeviceError: a tensor that should arrive on a device of this worker cannot.
        """
        if self._payload is None:
            assert self._envelope is not None
            if self._envelope.pending is not None:
                with blocking():
                    self._envelope.pending.wait(None)
            self._payload = open_payload(self._envelope, self._answerer.staging)
            self._envelope = None
        return self._payload

    def has_beside(self, call_id: int) -> bool:
        """Whether call `call_id` of the same caller is here, and not answered yet."""
        return self._answerer.is_serving(self.source.incarnation, call_id)

    @property
    def stream(self) -> Buffer:
        """What is still there of its packed or pickled values; it may be nothing. To be looked at only."""
        came, payload = self._envelope, self._payload
        if payload is not None:
            return payload.data
        return b"" if came is None else came.data

    def let_go(self) -> None:
        """It will not be begun: keep nothing of what came with it."""
        self._envelope = None

    @property
    def event_loop(self) -> EventLoop:
        """Where `async def` functions run."""
        return self._answerer.event_loop

    @property
    def async_calls(self) -> AsyncCalls:
        """Where asynchronous functions are counted until their futures are done."""
        return self._answerer.async_calls

    def context(self) -> AbstractContextManager[None]:
        """What the caller's hooks ask for while this request is served. Enter it once, before the payload is loaded."""
        if not self.extras:
            return _nothing
        hooks = self._answerer.hooks
        asked = [(hooks[key], meta) for key, meta in self.extras.items() if key in hooks]
        if not asked:
            return _nothing
        if len(asked) > 1:
            return self._contexts(asked)
        hook, meta = asked[0]
        return hook.receive(self.source, meta, self.payload, False)

    @contextmanager
    def _contexts(self, asked: list[tuple[CallHook, Any]]) -> Iterator[None]:
        with ExitStack() as stack:
            for hook, meta in asked:
                stack.enter_context(hook.receive(self.source, meta, self.payload, False))
            yield

    def run(self, work: Callable[[], None]) -> BaseException | None:
        """Run `work`, which answers, in what the caller's hooks ask for. What it raises is the answer.

        An error does not pass through the contexts of the hooks: `contextlib` cannot take one whose class is frozen.

        Returns:
            What it raised.
        """
        if self.answered:  # it was cancelled meanwhile
            return None
        failures: list[BaseException] = []
        try:
            with self.context():
                try:
                    work()
                except BaseException as failure:
                    failures.append(failure)
        except BaseException as failure:
            failures.append(failure)
        if not torch.is_grad_enabled():  # a function has switched it off for its thread, which others use too
            torch.set_grad_enabled(True)
        if not failures:
            return None
        if self.answered:
            log_error(
                log,
                "%s of %s was answered, and then failed",
                type(self.message).__name__,
                self.source,
                error=failures[0],
            )
        else:
            self.fail(failures[0])
        return failures.pop()

    def reply(self, payload: Payload | None = None) -> None:
        """Answer that the request was carried out, with what came of it."""
        self._answerer.answer(self, payload, None)  # type: ignore[arg-type]  # M is a Message
        self._listeners = None  # they refer to it

    def fail(self, error: BaseException) -> None:
        """Answer that the request raised `error`."""
        self._answerer.answer(self, None, error)  # type: ignore[arg-type]  # M is a Message
        self._listeners = None
