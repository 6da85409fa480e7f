"""An exception that several threads, or one thread several times, may raise.

What: each time an exception is raised, the interpreter adds to its `__traceback__` the frames that it passes, with all
that these refer to, and sets its `__context__`. So of an exception that is kept copies are raised.

Invariants: what is kept never changes. Threads: any. Failure: a class whose instances cannot be copied has the
exception itself raised, with the traceback that it came with.
"""

from __future__ import annotations

from contextlib import suppress

from zrpc.exception_text import (
    args_of,
    cause_of,
    context_of,
    is_interrupt,
    set_args,
    set_cause,
    set_context,
    set_suppresses_context,
    suppresses_context,
    traceback_of,
)
from zrpc.wire.exception_fields import constructor_args, dict_of, new, set_slots, slot_values


class Raisable:
    """Keeps one exception, to raise copies of it.

    Attributes:
        error: the exception. Not to be raised but by `take`.
    """

    __slots__ = ("_kept", "_traceback", "_untaken", "error")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self._kept = error
        self._untaken = [error]
        self._traceback = traceback_of(error)

    def take(self) -> BaseException:
        """The exception itself, to raise, for the first that asks; then copies of it as it was."""
        if self._untaken:
            kept = copy_exception(self.error)
            with suppress(IndexError):  # another thread was quicker
                error = self._untaken.pop()
                self._kept = kept
                return error
        return self.copy()

    def drop_traceback(self) -> None:
        """Keep the traceback that the exception came with no longer: it refers to frames, and these to others."""
        self._traceback = None

    def copy(self) -> BaseException:
        """A copy to raise: of the same class, with the same fields, links and traceback."""
        return BaseException.with_traceback(copy_exception(self._kept), self._traceback)


def copy_exception(error: BaseException) -> BaseException:
    """A shallow copy of `error`, made without calling its class; `error` itself if there can be none."""
    cls = type(error)
    try:
        copied = new(cls, constructor_args(error))
        if type(copied) is not cls:
            return error
        attributes = dict_of(copied)
        attributes.update(dict_of(error))
        if type(attributes.get("__notes__")) is list:
            attributes["__notes__"] = list(attributes["__notes__"])
        set_slots(copied, slot_values(error))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return error
    set_args(copied, args_of(error))
    set_cause(copied, cause_of(error))
    set_context(copied, context_of(error))
    set_suppresses_context(copied, suppresses_context(error))
    return copied
