"""How any exception in a payload is taken apart. `zrpc.wire.exception_rebuild` makes it again.

What: the outcome of a call, members of a group, `__cause__` and `__context__`, exceptions that are attributes of
others, arguments or results: the stream has a number for each, and a table beside it an `ExceptionState`, once. So a
chain takes no more room than its exceptions, and what one leads to does not depend on it. A state has the class, the
arguments, and each attribute and slot as a stream of its own, so that one which cannot be pickled, or not be made
again, takes no other along. The constructor of a user's class is not called. A class that defines `__reduce__`,
`__reduce_ex__` or `__setstate__` is made as these say; if that raises, as any other.

Invariants: pickling an exception never fails, and neither does making one again. An exception arrives as its own class
if that can be imported, and with its own text; else as a `RemoteError` that is also of the nearest base class that can
be. An exception that is met twice in a payload, or that leads back to itself, arrives as one object.

Threads: any; the tables of a payload belong to the thread that reads or writes it.

Failure: `zrpc.exception_text.is_interrupt` says which errors are not the class's own and are raised.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from zrpc.errors import RemoteError
from zrpc.exception_text import (
    cause_of,
    class_name,
    context_of,
    is_interrupt,
    module_name,
    repr_of,
    suppresses_context,
    text_of,
)
from zrpc.wire import reducers
from zrpc.wire.exception_fields import (
    ExceptionState,
    Part,
    Unsent,
    constructor_args,
    dict_of,
    interpreters_base,
    is_interpreters,
    slot_values,
)
from zrpc.wire.stand_in import MARK

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROTOCOL = 5
MAX_REPR = 10_000
"""How many characters are sent of an argument that cannot be pickled."""
_PLAIN = (str, int, type(None), bool, float, bytes)


class Named:
    """Stands for an exception where the pickler must not ask for its class, which may have no hash."""

    __slots__ = ("_error",)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return reducers.reduce_exception(self._error)


def take_all_apart() -> bytes | None:
    """The table of the exceptions that the stream of this thread leads to; None: there are none."""
    sent = reducers.under_way.sent_exceptions
    if sent is None or not sent.errors:
        return None
    states = []
    for number, error in enumerate(sent.errors):  # what a state leads to is appended meanwhile
        states.append(tuple(_state_of(number, error)))
    return pickle.dumps(states, _PROTOCOL)


def _state_of(number: int, error: BaseException) -> ExceptionState:
    try:
        return _take_apart(number, error)
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        text = text_of(error)
        nearest = ("builtins", interpreters_base(type(error)).__name__)
        name = class_name(type(error))
        return ExceptionState(number, [nearest], False, name, text, None, [(False, text)], {}, {}, {}, True, False)


def _take_apart(number: int, error: BaseException) -> ExceptionState:
    cls = type(error)
    parts = _Parts()
    importable = [one for one in _bases(cls) if _find(one) is one]
    is_own = importable[:1] == [cls]
    return ExceptionState(
        number=number,
        classes=[(module_name(one), class_name(one)) for one in importable],
        has_own_class=is_own,
        name=class_name(cls),
        text=text_of(error),
        reduced=_reduced(error) if is_own else None,
        args=[parts.argument(one) for one in _named_args(error)],
        attributes=parts.of(dict_of(error)),
        slots=parts.of(slot_values(error)),
        links={
            name: reducers.sent_exceptions().number_of(link)
            for name, link in (("cause", cause_of(error)), ("context", context_of(error)))
            if link is not None
        },
        suppresses_context=suppresses_context(error),
        is_whole=parts.is_whole,
    )  # fmt: skip


def _named_args(error: BaseException) -> tuple[Any, ...]:
    args = constructor_args(error)
    if issubclass(type(error), BaseExceptionGroup):
        message, members = args
        return message, [Named(member) for member in members]
    return args


class _Parts:
    """Pickles the parts of one exception, and notes whether all of them could be."""

    def __init__(self) -> None:
        self.is_whole = True

    def of(self, values: dict[str, Any]) -> dict[str, Part]:
        """Those of `values` that can be pickled."""
        parts = {}
        for name, value in list(values.items()):
            part = self._part(value) if type(name) is str else None
            if part is not None:
                parts[name] = part
            else:
                self.is_whole = False
        return parts

    def argument(self, value: object) -> Part:
        """`value`, or what stands for it."""
        part = self._part(value)
        if part is not None:
            return part
        self.is_whole = False
        return True, reducers.dump_part(Unsent(repr_of(value, MAX_REPR)))

    def _part(self, value: object) -> Part | None:
        cls = type(value)
        if any(cls is plain for plain in _PLAIN):
            return False, value
        try:
            return True, reducers.dump_part(Named(value) if isinstance(value, BaseException) else value)
        except BaseException as failure:
            if is_interrupt(failure):
                raise
            return None


def _reduced(error: BaseException) -> tuple[bytes, bytes | None] | None:
    """How its own class would have it pickled, if it says anything about that."""
    try:
        cls: Any = type(error)
        interpreters: Any = interpreters_base(cls)
        reducer = copyreg.dispatch_table.get(cls)
        says = (
            reducer is not None
            or cls.__reduce__ is not interpreters.__reduce__
            or cls.__reduce_ex__ is not object.__reduce_ex__
            or cls.__setstate__ is not interpreters.__setstate__
        )
        if not says:
            return None
        reduced: Any = reducer(error) if reducer is not None else error.__reduce_ex__(_PROTOCOL)
        if not isinstance(reduced, tuple):
            return None
        function, args, *state = reduced
        with reducers.tentatively():
            made = reducers.dump_part((function, args))
            return made, reducers.dump_part(state[0]) if state and state[0] is not None else None
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return None


def _bases(cls: type) -> Iterator[type]:
    """`cls` and its bases, without stand-ins for classes of another worker, down to one of the interpreter's own."""
    is_stand_in = MARK in vars(cls)
    ours = RemoteError.__mro__ if is_stand_in else ()
    for base in type.mro(cls):
        if MARK in vars(base) or (base in ours and not is_interpreters(base)):
            continue
        if is_stand_in and base is RuntimeError:
            continue
        yield base
        if is_interpreters(base):
            return


def _find(cls: type) -> object | None:
    """What is found under the name of `cls`, as pickle looks for it."""
    try:
        return attrgetter(class_name(cls))(sys.modules[module_name(cls)])  # type: ignore[no-any-return]
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return None
