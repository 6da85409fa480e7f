"""The hooks of a worker: what rides on its calls."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from zrpc.ids import WorkerInfo
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload


class CallHook(Protocol):
    """Something that rides on calls: autograd, profiling. Its metadata travels in the envelope under its key.

    Attributes:
        key: names it.
        is_idle: it has nothing to say of requests as long as this is true.
    """

    key: str
    is_idle: bool

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """A hooked request (`request_meta` None), or the answer to one that came with `request_meta`, is to be sent.

        May replace tensors of `payload`. Returns metadata that msgpack can carry, or None.
        """

    def receive(
        self, source: WorkerInfo, meta: object, payload: Payload, is_reply: bool
    ) -> AbstractContextManager[None]:
        """Metadata came with a request or an answer. Replaces tensors of `payload` before it is read.

        The context returned is entered around the serving of a request; for an answer it is not.
        """

    def carry_over(self) -> AbstractContextManager[None] | None:
        """A context in which calls that this thread would make now may be made later, by another thread.

        None: calls are the same there.
        """


class PassengerHook(CallHook, Protocol):
    """The hook of the passengers: it is asked for each message that has some, and for no other."""

    def discard(self, meta: object) -> None:
        """Metadata came with a message that is not read: let go of what it announces. Runs on a handler thread."""

    def answering(self, to: WorkerInfo, call_id: int, meta: object) -> None:
        """The answer to call `call_id` of `to` is about to leave, with this metadata."""

    def unanswered(self, to: WorkerInfo, call_id: int, meta: object) -> None:
        """A call ended without an answer; `meta` went with it. On any thread, one that reads included."""


class Hooks(dict[str, CallHook]):
    """The hooks by their keys. Filled before the worker joins its group, and not changed after.

    Attributes:
        passengers: the one of them that sees to passengers (`zrpc.wire.payload.Passenger`).
    """

    passengers: PassengerHook | None = None

    def add(self, hook: CallHook) -> None:
        """Let `hook` ride on every hooked call."""
        self[hook.key] = hook

    def add_passengers(self, hook: PassengerHook) -> None:
        """The same; it is `hook` that sees to passengers."""
        self.passengers = hook
        self.add(hook)

    def send(
        self, to: WorkerInfo, message: Message, payload: Payload, request_extras: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """What the hooks add to a request, or to the answer of one that came with `request_extras`."""
        extras = {}
        for key, hook in self.items():
            if hook is self.passengers:
                is_asked = payload.passengers is not None
            else:
                is_asked = not hook.is_idle if request_extras is None else key in request_extras
            if is_asked:
                meta = hook.send(to, message, payload, request_extras.get(key) if request_extras else None)
                if meta is not None:
                    extras[key] = meta
        return extras or None

    @contextmanager
    def carried_over(self, contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
        """Calls that are made in the body are as calls of the thread that `carry_over` was called on."""
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield

    def carry_over(self) -> list[AbstractContextManager[None]]:
        """What is to be given to `carried_over`, once."""
        return [context for hook in self.values() if (context := hook.carry_over()) is not None]

    def receive_answer(self, source: WorkerInfo, extras: dict[str, Any] | None, payload: Payload) -> None:
        """Let the hooks see an answer."""
        for key, meta in (extras or {}).items():
            hook = self.get(key)
            if hook is not None:
                hook.receive(source, meta, payload, True)

    def announced(self, extras: dict[str, Any] | None) -> object:
        """What `extras` say of passengers that are not received yet; None: there are none."""
        if extras is None or self.passengers is None:
            return None
        return extras.get(self.passengers.key) or None

    def discard(self, extras: dict[str, Any]) -> None:
        """A message came that is not read (any more): let its passengers go. Runs on a handler thread."""
        if self.passengers is not None and self.passengers.key in extras:
            self.passengers.discard(extras[self.passengers.key])
