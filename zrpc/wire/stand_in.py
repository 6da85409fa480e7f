"""Classes for exceptions that cannot be of their own class here.

What: a stand-in is a `RemoteError` that is also of another class of exceptions, with the name of a third and a given
text. Each is made for one exception. Threads: any. Failure: see `stand_in`; `as_stand_in` does not raise.
"""

from __future__ import annotations

import types
from typing import Any

from zrpc.errors import RemoteError
from zrpc.exception_text import (
    args_of,
    cause_of,
    class_name,
    context_of,
    is_interrupt,
    module_name,
    set_args,
    set_cause,
    set_context,
    set_suppresses_context,
    suppresses_context,
)
from zrpc.wire.exception_fields import constructor_args, dict_of, new, set_slots, slot_values

MARK = "_zrpc_stand_in"
"""An attribute of each such class."""


def stand_in(cls: type[BaseException], name: str, text: str) -> type[BaseException]:
    """A class for one exception: a `RemoteError` that is also a `cls`, and whose text is `text`.

    Raises:
        BaseException: there can be no class that is both, or what making a subclass of `cls` runs raises.
    """

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update({
            "__module__": module_name(cls), "__qualname__": name, "__str__": lambda _: text, MARK: True,
            "__del__": lambda _: None,  # a destructor may need what did not travel
        })  # fmt: skip

    if issubclass(cls, RemoteError):
        bases: tuple[type, ...] = (cls,)
    else:
        bases = (RemoteError,) if issubclass(RemoteError, cls) else (cls, RemoteError)
    return types.new_class(name.rpartition(".")[2], bases, exec_body=fill)


def is_plain_stand_in(error: BaseException) -> bool:
    """Whether `error` stands for one of which no class but those of every error could be imported."""
    return type(error).__bases__ == (RemoteError,) and MARK in vars(type(error))


def as_stand_in(error: BaseException, text: str) -> BaseException | None:
    """`error` as a `RemoteError` that is also of its class, with `text` for its text; None if it cannot be both."""
    try:
        made = new(stand_in(type(error), class_name(type(error)), text), constructor_args(error))
        dict_of(made).update(dict_of(error))
        set_slots(made, slot_values(error))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return None
    set_args(made, args_of(error))
    set_cause(made, cause_of(error))
    set_context(made, context_of(error))
    set_suppresses_context(made, suppresses_context(error))
    return made
