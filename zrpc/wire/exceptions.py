"""Remote exceptions: how one travels, and how it is raised again.

An exception travels as its class, its arguments and its attributes, and is put together again without calling its
constructor, so a class whose constructor takes other arguments than it passes on does not get in the way. A class that
says itself how it is pickled (`__reduce__`) is taken at its word. The remote traceback is attached as `__cause__`.
Where class or arguments cannot travel, the caller gets a `RemoteError` with the text.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from zrpc.errors import RemoteError, SerializationError
from zrpc.wire import pickling
from zrpc.wire.messages import Failure
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.ids import WorkerInfo

    Translator = Callable[[Exception, str], Exception]


class RemoteTraceback(Exception):  # it is no error: it shows where one came from
    """Where on the remote worker an exception was raised; the cause of the exception as raised here."""

    def __init__(self, worker: WorkerInfo, text: str) -> None:
        super().__init__(worker, text)
        self.worker = worker
        self.text = text

    def __str__(self) -> str:
        return f"On {self.worker}:\n{self.text}"


_translators: list[Translator] = []


def translate_with(translator: Translator) -> None:
    """From now on raise `translator(error, remote_text)` for a remote `error`."""
    _translators.append(translator)


def dump_exception(error: BaseException) -> tuple[Failure, Payload]:
    """The message and payload that carry `error`."""
    text = "".join(traceback.format_exception(error))
    failure = Failure(type(error).__qualname__, _text_of(error), text)
    for form in _forms(error):
        try:
            return failure, pickling.dumps(form)
        except SerializationError:
            continue
    return failure, Payload()


def load_exception(worker: WorkerInfo, failure: Failure, payload: Payload) -> BaseException:
    """The exception that `worker` answered with, ready to be raised."""
    try:
        form = pickling.loads(payload)
        error = _rebuild(*form) if isinstance(form, tuple) else form
    except Exception:
        error = None
    if not isinstance(error, Exception):
        error = RemoteError(f"On {worker}:\n{failure.type_name}: {failure.text}\n{failure.traceback}")
    remote = RemoteTraceback(worker, failure.traceback)
    for translate in _translators:
        error = translate(error, str(remote))
    error.__cause__ = remote
    return error


def _forms(error: BaseException) -> Iterator[Any]:
    """What to try to pickle for `error`, the best first."""
    cls = type(error)
    if cls.__reduce__ is not _interpreters(cls).__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__:
        yield error
        yield cls, error.args, {}
        return
    reduced = error.__reduce__()
    assert isinstance(
        reduced, tuple
    )  # the interpreter's own classes give (class, arguments) or (class, arguments, state)
    yield cls, reduced[1], (reduced[2] if len(reduced) > 2 else {}) or {}
    yield cls, reduced[1], {}


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    _interpreters(cls).__init__(error, *args)  # fills the fields that the interpreter keeps outside __dict__
    BaseException.__setstate__(error, state)
    return error


def _interpreters(cls: type[BaseException]) -> type[BaseException]:
    """The nearest base of `cls`, or itself, that is one of the interpreter's own classes."""
    return next(base for base in cls.__mro__ if base.__module__ == "builtins")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as nested:
        return f"<its text cannot be made: {nested!r}>"
