"""Exceptions as plain values, for workers that unpickle nothing: as classes of a table, made of plain arguments.

What: an exception travels as its text and, if its class or one of its bases is in the table, the name of that class,
with its arguments if these are plain. The table has the exceptions of the interpreter and of zrpc. One of any other
class arrives as a `RemoteError` that is also of its nearest base class in the table, under its own name.

Threads: any. Failure: neither function raises because of what an exception is made of.
"""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

from zrpc import errors
from zrpc.errors import ProtocolError, RemoteError
from zrpc.exception_text import class_name, is_interrupt, text_of
from zrpc.wire import values
from zrpc.wire.exception_fields import constructor_args, new
from zrpc.wire.stand_in import stand_in

if TYPE_CHECKING:
    from zrpc.wire.payload import Payload

PREFIX = bytes([values.MAGIC, 7])
"""What the stream of such an exception begins with."""

_TABLE: dict[tuple[str, str], type[Exception]] = {
    (module.__name__, name): cls
    for module in (errors, builtins)
    for name, cls in vars(module).items()
    if isinstance(cls, type) and issubclass(cls, Exception) and cls.__module__ == module.__name__
}
_NAMES = {cls: name for name, cls in _TABLE.items()}


def dump(error: BaseException) -> Payload:
    """Take `error` apart."""
    cls = type(error)
    known = next((base for base in cls.__mro__ if base in _NAMES), Exception)
    told = [*_NAMES[known], known is cls, class_name(cls), text_of(error)]
    try:
        return values.pack([*told, list(constructor_args(error)) if known is cls else None], PREFIX)
    except values.UnpackableError:
        return values.pack([*told, None], PREFIX)


def load(payload: Payload) -> Exception:
    """The exception that `dump` took apart.

    Raises:
        ProtocolError: the stream is damaged.
    """
    try:
        module, known_name, is_own, name, text, args = values.unpack(payload, PREFIX)
        known = _TABLE.get((module, known_name), Exception)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"an exception cannot be read: {error}") from error
    if is_own and args is not None:
        made = _make(known, args)
        if made is not None:
            return made
    made = _make(stand_in(known, str(name), str(text)), ())
    return RemoteError(f"{name}: {text}") if made is None else made


def _make(cls: type[BaseException], args: Any) -> Exception | None:
    try:
        made = new(cls, tuple(args))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return None
    return made if isinstance(made, Exception) else None
