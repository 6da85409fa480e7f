"""Text of exceptions of any class, and their links to other exceptions.

What: exceptions are made by users' classes, whose methods may raise anything, `SystemExit` included. The functions here
read and log them without such an error getting through.

Invariants: no function here raises because of what a class of exceptions does, nor calls it where there is another way:
links are read and set through `BaseException` itself, past `__getattr__` and past the `__setattr__` of frozen classes.

Threads: any.

Failure: an interrupt of the main thread (`is_interrupt`) is raised; it is not the class's.
"""

from __future__ import annotations

import functools
import opcode
import signal
import threading
import traceback
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging
    from types import TracebackType

MAX_LENGTH = 1_000_000
"""How many characters of one text are kept."""

MAX_MEMBERS = 1000
"""How many members of groups are formatted, each as often as there are ways to it."""

_FIELDS: Any = vars(BaseException)
_CLASS_FIELDS: Any = vars(type)
_RAISE = opcode.opmap["RAISE_VARARGS"]


def is_interrupt(error: BaseException) -> bool:
    """Whether `error` interrupts this thread: a signal handler raised it, and these run on the main thread only.

    All other `KeyboardInterrupt` and `SystemExit` come from the code that was called.
    """
    if not issubclass(type(error), KeyboardInterrupt | SystemExit):  # isinstance would ask the error's `__class__`
        return False
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = _handler_codes()
    last, entry = None, traceback_of(error)
    while entry is not None:
        if entry.tb_frame.f_code in handlers:
            return True
        last, entry = entry, entry.tb_next
    if last is None or not issubclass(type(error), KeyboardInterrupt):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] != _RAISE  # else Ctrl-C struck between two instructions


def _handler_codes() -> set[CodeType]:
    """The code of the signal handlers that are written in Python."""
    codes = set()
    handlers: list[Any] = [signal.getsignal(number) for number in signal.valid_signals()]
    handlers += [handler.__wrapped__ for handler in handlers if hasattr(handler, "__wrapped__")]  # see zrpc.interrupts
    for handler in handlers:
        while isinstance(handler, functools.partial):
            handler = handler.func
        handler = getattr(handler, "__func__", handler)
        if not hasattr(handler, "__code__"):
            handler = type(handler).__call__  # an object that can be called
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType):
            codes.add(code)
    return codes


def class_name(cls: type) -> str:
    """The qualified name of `cls`, whatever its metaclass does."""
    return plain_text(_CLASS_FIELDS["__qualname__"].__get__(cls))


def module_name(cls: type) -> str:
    """The name of the module of `cls`, whatever its metaclass does; "" if it says none."""
    try:
        module = _CLASS_FIELDS["__module__"].__get__(cls)
    except AttributeError:
        return ""
    return plain_text(module) if isinstance(module, str) else ""


def text_of(error: BaseException) -> str:
    """`str(error)`, or words that say why there is none."""
    try:
        return plain_text(str(error))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return f"<its text cannot be made: {_name_and_args(failure)}>"


def describe(error: BaseException) -> str:
    """The class and text of `error` in one line, such as `ValueError: wrong`."""
    text = text_of(error)
    return f"{class_name(type(error))}: {text}" if text else class_name(type(error))


def repr_of(value: object, max_length: int = 200) -> str:
    """`repr(value)`, cut to `max_length` characters, or the name of its class where that raises."""
    try:
        text = plain_text(repr(value))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return f"a {class_name(type(value))}"
    return text if len(text) <= max_length else f"{text[:max_length]}..."


def format_exception(error: BaseException) -> str:
    """`error` with its traceback and the exceptions that it is linked to, as the interpreter would print it."""
    try:
        if num_members(error) <= MAX_MEMBERS:
            return plain_text("".join(traceback.format_exception(error)))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
    try:
        where = "".join(traceback.format_tb(traceback_of(error)))
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        where = ""
    return plain_text(f"Traceback (most recent call last):\n{where}{describe(error)}\n")


def num_members(error: BaseException) -> int:
    """How many exceptions are in the group `error`, it included: each as often as there are ways to it.

    It counts no further than a little above `MAX_MEMBERS`.
    """
    count, left = 0, [error]
    while left and count <= MAX_MEMBERS:
        count += 1
        member = left.pop()
        if issubclass(type(member), BaseExceptionGroup):
            left += vars(BaseExceptionGroup)["exceptions"].__get__(member)
    return count


def log_error(log: logging.Logger, message: str, *args: object, error: BaseException) -> None:
    """Log `message` with `error` and its traceback.

    Handlers of the log get `error` itself if it can be formatted, else its text.
    """
    try:
        can_be_formatted = num_members(error) <= MAX_MEMBERS
        if can_be_formatted and module_name(type(error)) != "builtins":
            traceback.format_exception(error)
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        can_be_formatted = False
    if can_be_formatted:
        log.error(message, *args, exc_info=(type(error), error, traceback_of(error)))
    else:
        log.error(f"{message}\n%s", *args, format_exception(error))


def plain_text(text: str) -> str:
    """`text` as an exact `str` that UTF-8 can encode, cut to `MAX_LENGTH` characters."""
    exact = str.__str__(text)
    if len(exact) > MAX_LENGTH:
        exact = f"{exact[:MAX_LENGTH]}... ({len(exact) - MAX_LENGTH} more characters)"
    return exact.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- links -------------------------------------------------------------------------------------------------------


def cause_of(error: BaseException) -> BaseException | None:
    """`error.__cause__`."""
    return _FIELDS["__cause__"].__get__(error)  # type: ignore[no-any-return]


def context_of(error: BaseException) -> BaseException | None:
    """`error.__context__`."""
    return _FIELDS["__context__"].__get__(error)  # type: ignore[no-any-return]


def suppresses_context(error: BaseException) -> bool:
    """`error.__suppress_context__`."""
    return bool(_FIELDS["__suppress_context__"].__get__(error))


def args_of(error: BaseException) -> tuple[Any, ...]:
    """`error.args`."""
    return _FIELDS["args"].__get__(error)  # type: ignore[no-any-return]


def set_cause(error: BaseException, cause: BaseException | None) -> None:
    """Set `error.__cause__`."""
    _FIELDS["__cause__"].__set__(error, cause)


def set_context(error: BaseException, context: BaseException | None) -> None:
    """Set `error.__context__`."""
    _FIELDS["__context__"].__set__(error, context)


def set_suppresses_context(error: BaseException, is_suppressed: bool) -> None:
    """Set `error.__suppress_context__`."""
    _FIELDS["__suppress_context__"].__set__(error, is_suppressed)


def set_args(error: BaseException, args: tuple[Any, ...]) -> None:
    """Set `error.args`."""
    _FIELDS["args"].__set__(error, args)


def traceback_of(error: BaseException) -> TracebackType | None:
    """`error.__traceback__`."""
    return _FIELDS["__traceback__"].__get__(error)  # type: ignore[no-any-return]


def without_traceback(error: BaseException) -> BaseException:
    """`error`, whose traceback is dropped."""
    return BaseException.with_traceback(error, None)


def _name_and_args(error: BaseException) -> str:
    """`error` in words, without `str()` of it."""
    try:
        args = ", ".join(repr_of(one) for one in args_of(error))
    except RecursionError:
        args = "..."
    return f"{class_name(type(error))}({args})"
