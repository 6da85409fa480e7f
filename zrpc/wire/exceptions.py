"""Remote exceptions: how one travels, and how it is raised again.

An exception travels as its class, its arguments and its attributes, and is put together again without calling its
constructor, so a class whose constructor takes other arguments than it passes on does not get in the way. Its remote
traceback is attached as `__cause__`, and as a note. Where class or arguments cannot travel, the caller gets a
`RemoteError` with the text.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from zrpc.errors import RemoteError, SerializationError
from zrpc.wire import pickling
from zrpc.wire.messages import Failure
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from zrpc.ids import WorkerInfo


class RemoteTraceback(Exception):  # it is no error: it shows where one came from
    """Where on the remote worker an exception was raised; the cause of the exception as raised here."""

    def __init__(self, worker: WorkerInfo, text: str) -> None:
        super().__init__(worker, text)
        self.worker = worker
        self.text = text

    def __str__(self) -> str:
        return f"On {self.worker}:\n{self.text}"


def dump_exception(error: BaseException) -> tuple[Failure, Payload]:
    """The message and payload that carry `error`."""
    text = "".join(traceback.format_exception(error))
    failure = Failure(type(error).__qualname__, _text_of(error), text)
    state = {name: value for name, value in vars(error).items() if not name.startswith("__")}
    for kept in (state, {}):
        try:
            return failure, pickling.dumps((type(error), _arguments_of(error), kept))
        except SerializationError:
            continue
    return failure, Payload()


def load_exception(worker: WorkerInfo, failure: Failure, payload: Payload) -> BaseException:
    """The exception that `worker` answered with, ready to be raised."""
    try:
        error = _rebuild(*pickling.loads(payload)) if len(payload.data) else None
    except Exception:
        error = None
    if error is None:
        error = RemoteError(f"On {worker}:\n{failure.type_name}: {failure.text}\n{failure.traceback}")
    remote = RemoteTraceback(worker, failure.traceback)
    error.__cause__ = remote
    return error


def _arguments_of(error: BaseException) -> tuple[Any, ...]:
    """What the class passed on to its base; for the classes of the interpreter, such as OSError, all it was made of."""
    reduced = error.__reduce__()
    return reduced[1] if isinstance(reduced, tuple) and reduced[0] is type(error) else error.args


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException | None:
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        return None
    error = cls.__new__(cls, *args)
    if cls.__init__ is not BaseException.__init__ and cls.__module__ == "builtins":
        error.__init__(*args)  # type: ignore[misc]  # the interpreter's own classes keep fields outside __dict__
    else:
        error.args = args
    error.__dict__.update(state)
    return error


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as nested:
        return f"<its text cannot be made: {nested!r}>"
