"""The owner's place for one value: empty, then a value or an error for good."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from zrpc.agent.pool import blocking
from zrpc.agent.scripted import ScriptValue
from zrpc.errors import RemoteError, RpcTimeoutError
from zrpc.exception_text import describe, set_cause
from zrpc.staging import handover
from zrpc.wire.raisable import Raisable

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.staging.streams import Mark


class Viewing(Protocol):
    """What is made of a value for compiled code, which changes it there."""

    def write_back(self) -> None:
        """Change in the value what compiled code has changed."""


V = TypeVar("V", bound=Viewing)


class Cell:
    """A value that may still be on its way. Any thread may use it; its lock owns the fields.

    Attributes:
        is_given: `RRef(value)` made it, and not a call.
    """

    __slots__ = ("_callbacks", "_error", "_lock", "_mark", "_value", "_view", "is_given")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_given = False
        self._callbacks: dict[Callable[[], None], None] | None = {}
        self._value: Any = None
        self._error: Raisable | None = None
        self._mark: Mark | None = None  # in the streams of the thread that made the value
        self._view: Viewing | None = None

    @classmethod
    def holding(cls, value: Any) -> Cell:
        """A cell that is set to `value`."""
        cell = cls()
        cell._value, cell._callbacks, cell.is_given = value, None, True
        if handover.streams is not None:
            cell._mark = handover.streams.mark()
        return cell

    def is_set(self) -> bool:
        """Whether the value or the error is here."""
        return self._callbacks is None

    @property
    def kind(self) -> str:
        """What it holds: the name of a type, or why it holds no value. No code of users is run."""
        if not self.is_set():
            return "(not made yet)"
        cls = type(self._value)
        return "(its making failed)" if self._error is not None else f"{cls.__module__}.{cls.__qualname__}"

    def set_value(self, value: Any) -> None:
        """Set the value, and run who waits for it on this thread. Nothing happens if the cell is set."""
        self._set(value, None)

    def set_error(self, error: BaseException) -> None:
        """As `set_value`: to ask for the value raises `error`, or tells of it if it would end a thread that asks."""
        if not issubclass(type(error), Exception):
            raised, error = error, RemoteError(f"making the value raised {describe(error)}")
            set_cause(error, raised)
        self._set(None, error)

    def when_set(self, callback: Callable[[], None]) -> None:
        """Run `callback` when the cell is set: at once if it is, else on the thread that sets it."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks[callback] = None
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Do not run `callback`, unless it is begun."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.pop(callback, None)

    def get(self) -> Any:
        """The value of a cell that is set; of a `ScriptValue`, what Python sees. Raises the error if it was set to one.

        Other values are not copied.
        """
        if self._view is not None:
            self._view.write_back()
        if self._error is not None:
            raise self._error.copy()
        if self._mark is not None:
            self._mark.join()
        value = self._value
        return value.to_python() if type(value) is ScriptValue else value

    def kept(self) -> Any:
        """As `get`, but a `ScriptValue` as it is."""
        if self._error is not None:
            raise self._error.copy()
        if self._mark is not None:
            self._mark.join()
        return self._value

    def view(self, make: Callable[[Any], V] | None = None) -> V | None:
        """What was made of the value for compiled code; if nothing was, it is made by `make`, if that is given."""
        if self._view is None and make is not None:
            made = make(self.kept())
            with self._lock:
                self._view = self._view or made
        return cast("V | None", self._view)

    def wait(self, timeout_s: float = 0.0) -> Any:
        """The value, as soon as it is there; `timeout_s` 0: no limit.

        Raises:
            RpcTimeoutError: it did not come in time.
            BaseException: what making it raised.
        """
        self.await_set(timeout_s)
        return self.get()

    def await_set(self, timeout_s: float = 0.0) -> None:
        """Wait until the value or the error is here; `timeout_s` 0: no limit.

        Raises:
            RpcTimeoutError: it did not come in time.
        """
        if self._callbacks is not None:
            arrived = threading.Event()
            self.when_set(arrived.set)
            with blocking():
                if not arrived.wait(timeout_s or None):
                    raise RpcTimeoutError(f"RPC ran for more than its time limit of {timeout_s * 1000:g} ms: "
                                          "the value of a local RRef was not set in time")  # fmt: skip

    def _set(self, value: Any, error: BaseException | None) -> None:
        with self._lock:
            callbacks = self._callbacks
            if callbacks is None:
                return
            self._value = value
            self._error = None if error is None else Raisable(error)
            if handover.streams is not None:
                self._mark = handover.streams.mark()
            self._callbacks = None
        for callback in callbacks:
            callback()
