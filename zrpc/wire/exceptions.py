"""Remote exceptions as outcomes of calls: how one is sent, and how it is raised again.

What: `dump_exception` makes the message and payload of a failed call, `load_exception` makes the exception that the
caller gets. How an exception is pickled, wherever it is in a payload, is in `zrpc.wire.exception_state`.

Invariants: neither raises, whatever the class of the exception does. Where on the remote worker it was raised is the
last of the causes of what the caller gets: its `__cause__`, if it had none of its own.

Threads: any. Failure: see `zrpc.exception_text`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zrpc.errors import RemoteError, ZrpcError
from zrpc.exception_text import cause_of, class_name, format_exception, is_interrupt, set_cause, text_of
from zrpc.wire import exception_rebuild, pickling, plain_exceptions
from zrpc.wire.messages import Failure
from zrpc.wire.payload import Payload
from zrpc.wire.reducers import make_exceptions_with
from zrpc.wire.stand_in import as_stand_in, is_plain_stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import WorkerInfo

    Translator = Callable[[Exception, str], Exception]


class RemoteTraceback(Exception):  # it is no error: it shows where one came from
    """Where on the remote worker an exception was raised: the last of its causes, as it is raised here."""

    def __init__(self, worker: WorkerInfo, text: str) -> None:
        super().__init__(worker, text)
        self.worker = worker
        self.text = text

    def __str__(self) -> str:
        return f"On {self.worker}:\n{self.text}"


make_exceptions_with(exception_rebuild.make)

_translators: list[Translator] = []


def translate_with(translator: Translator) -> None:
    """From now on raise `translator(error, remote_text)` for a remote `error`."""
    _translators.append(translator)


def dump_exception(error: BaseException, *, attachments: bool = True) -> tuple[Failure, Payload]:
    """The message and payload that carry `error`; without `attachments`, what of it has tensors or RRefs in it
    is left out."""
    failure = Failure(class_name(type(error)), text_of(error), format_exception(error))
    try:
        return failure, pickling.dumps_exception(error, attachments=attachments)
    except BaseException as unsendable:
        if is_interrupt(unsendable):
            raise
        return failure, Payload()


def load_exception(worker: WorkerInfo, failure: Failure, payload: Payload) -> BaseException:
    """The exception that `worker` answered with, ready to be raised."""
    try:
        is_plain = payload.data[: len(plain_exceptions.PREFIX)] == plain_exceptions.PREFIX
        received: Any = plain_exceptions.load(payload) if is_plain else pickling.loads(payload)
    except ZrpcError:
        received = None
    remote = RemoteTraceback(worker, failure.traceback)
    error: Exception
    if issubclass(type(received), Exception) and not is_plain_stand_in(received):
        error = received
    else:
        text = f"On {worker}:\n{failure.type_name}: {failure.text}\n{failure.traceback}"
        told = as_stand_in(received, text) if issubclass(type(received), Exception) else None
        error = told if isinstance(told, Exception) else RemoteError(text)
    for translate in _translators:
        error = translate(error, str(remote))
    _add_cause(error, remote)
    return error


def remote_traceback(error: BaseException) -> RemoteTraceback | None:
    """Where on another worker `error` was raised; None if it was raised here."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if type(cause) is RemoteTraceback:
            return cause
        seen.add(id(cause))
        cause = cause_of(cause)
    return None


def _add_cause(error: BaseException, remote: RemoteTraceback) -> None:
    """Make `remote` the last cause of `error`. It tells all that a traceback of an earlier worker tells."""
    seen = {id(error)}
    last = error
    while (cause := cause_of(last)) is not None and id(cause) not in seen and type(cause) is not RemoteTraceback:
        seen.add(id(cause))
        last = cause
    set_cause(last, remote)
