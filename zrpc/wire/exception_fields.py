"""What an exception of any class consists of, and an exception as it travels.

What: fields are read and set past what the class defines (`__getattr__`, `__setattr__`, properties). Failure: what is
said of each function. Threads: any.
"""

from __future__ import annotations

import builtins
from contextlib import suppress
from types import MemberDescriptorType
from typing import Any, NamedTuple

from zrpc.exception_text import set_args

_FIELDS: Any = vars(BaseException)
_INTERPRETERS = frozenset(id(one) for one in vars(builtins).values() if isinstance(one, type))
_NOT_SENT: dict[type, set[str]] = {AttributeError: {"obj"}}
"""Fields that the interpreter keeps for its suggestions: `obj` may be anything, and of any size."""

ClassName = tuple[str, str]
"""Module and qualified name."""
Part = tuple[bool, Any]
"""A plain value and false; or true, and a stream that gives the value."""


class Unsent:
    """Stands, among the arguments of an exception, for one that could not travel. It has the same `repr`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class ExceptionState(NamedTuple):
    """What travels of an exception. All streams are of `reducers.dump_part`.

    Attributes:
        number: which one of the payload it is.
        classes: its class and the bases of that, the nearest first; those that can be imported, down to the first one
            of the interpreter's own.
        has_own_class: whether the first of them is its class.
        name: the qualified name of its class.
        text: its text.
        reduced: how its class makes it again, and the state for that; None if any class of its kind is made so.
        args: its arguments.
        attributes: what is in its `__dict__`, by name.
        slots: what is in its slots, and in the fields that the interpreter keeps outside `__dict__`, by name.
        links: the numbers of "cause" and "context", where it has them.
        suppresses_context: its `__suppress_context__`.
        is_whole: whether nothing was left out.
    """

    number: int
    classes: list[ClassName]
    has_own_class: bool
    name: str
    text: str
    reduced: tuple[bytes, bytes | None] | None
    args: list[Part]
    attributes: dict[str, Part]
    slots: dict[str, Part]
    links: dict[str, int]
    suppresses_context: bool
    is_whole: bool


def constructor_args(error: BaseException) -> tuple[Any, ...]:
    """What the constructor of the interpreter's class of `error` takes to make one like it."""
    if issubclass(type(error), BaseExceptionGroup):
        fields: Any = vars(BaseExceptionGroup)
        return fields["message"].__get__(error), list(fields["exceptions"].__get__(error))
    reduced: Any = interpreters_base(type(error)).__reduce__(error)
    return tuple(reduced[1])


def dict_of(error: BaseException) -> dict[str, Any]:
    """The attributes of `error` that are in no slot: not a copy."""
    return _FIELDS["__dict__"].__get__(error)  # type: ignore[no-any-return]


def slot_values(error: BaseException) -> dict[str, Any]:
    """What is set of the slots of `error`, and of the fields that the interpreter keeps outside of `__dict__`."""
    values = {}
    for name, descriptor in slots_of(type(error)).items():
        try:
            value = descriptor.__get__(error)
        except AttributeError:  # never set
            continue
        if value is not None or not is_interpreters(descriptor.__objclass__):
            values[name] = value
    return values


def slots_of(cls: type) -> dict[str, Any]:
    """The fields of instances outside of `__dict__`, each with its descriptor. The nearest class's of a name counts."""
    found: dict[str, Any] = {}
    for base in type.mro(cls):
        if base is BaseException:
            break
        if base in (ExceptionGroup, BaseExceptionGroup):
            continue  # fields that its constructor sets, and nothing else may
        for name, descriptor in vars(base).items():
            if isinstance(descriptor, MemberDescriptorType) and name not in _NOT_SENT.get(base, ()):
                found.setdefault(name, descriptor)
    return found


def is_interpreters(cls: type) -> bool:
    """Whether `cls` is one of the interpreter's own classes, whatever it says of its module."""
    return id(cls) in _INTERPRETERS


def interpreters_base(cls: type) -> type[BaseException]:
    """The nearest base of `cls`, or itself, that is one of the interpreter's own classes."""
    return next(base for base in type.mro(cls) if is_interpreters(base))


def set_slots(error: BaseException, values: dict[str, Any]) -> None:
    """Set what is in `values` of the slots of `error`, and pass over what cannot be set."""
    slots = slots_of(type(error))
    for name, value in values.items():
        if name in slots:
            with suppress(AttributeError, TypeError):
                slots[name].__set__(error, value)


def new(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An instance of `cls`, made by the constructor of the interpreter's class only."""
    base: Any = interpreters_base(cls)
    try:
        error: BaseException = base.__new__(cls, *args)
        base.__init__(error, *args)
    except Exception:
        if issubclass(cls, BaseExceptionGroup):
            raise
        error = base.__new__(cls)
        set_args(error, args)
    return error
