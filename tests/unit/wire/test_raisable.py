"""Exceptions that are raised several times."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.unit.wire import test_exception_state as kinds
from zrpc.wire.raisable import Raisable, copy_exception

if TYPE_CHECKING:
    from types import TracebackType


def length(traceback: TracebackType | None) -> int:
    count = 0
    while traceback is not None:
        traceback, count = traceback.tb_next, count + 1
    return count


def lengths_of(raisable: Raisable, times: int) -> set[int]:
    """How long tracebacks get when it is raised so often."""
    found = set()
    for _ in range(times):
        try:
            raise raisable.take()  # its context is looked at
        except Exception as error:
            found.add(length(error.__traceback__))
    return found


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x", 2),
        OSError(2, "No such file", "/f"),
        OSError(2, "No such file"),
        TimeoutError("took too long"),
        ImportError("no"),
        kinds.SlottedBelow(),
        kinds.Frozen(7),
        kinds.FrozenSlotted(7),
        kinds.Quota(3, 4),
        kinds.Refused(403),
        ExceptionGroup("g", [kinds.Quota(3, 4)]),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        kinds.Final("f"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_copy_is_of_the_same_class_with_the_same_fields(error: Exception) -> None:
    vars(error)["extra"] = [1]
    set_cause = vars(BaseException)["__cause__"].__set__
    set_cause(error, KeyError("cause"))
    copied = copy_exception(error)
    assert copied is not error
    assert type(copied) is type(error)
    assert copied.args == error.args
    assert vars(copied) == vars(error)
    assert copied.__cause__ is error.__cause__
    assert copied.__suppress_context__ is error.__suppress_context__
    assert repr(copied) == repr(error)


def test_the_first_gets_the_exception_itself_and_others_copies_of_it_as_it_was() -> None:
    error = TimeoutError("took too long")
    error.add_note("of its own")
    raisable = Raisable(error)
    try:
        raise KeyError("handled meanwhile")
    except KeyError:
        with pytest.raises(TimeoutError) as first:
            raise raisable.take()  # noqa: B904  # its context is looked at
    assert first.value is error
    error.add_note("of the first")
    for _ in range(2):
        copied = raisable.take()
        assert copied is not error
        assert (str(copied), copied.__notes__) == ("took too long", ["of its own"])
        assert copied.__context__ is None
        copied.add_note("of a copy")


def test_tracebacks_do_not_grow_with_each_raise() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        raisable = Raisable(error)
    assert lengths_of(raisable, 100) == {2}


def test_threads_that_raise_at_once_do_not_share_an_exception() -> None:
    raisable = Raisable(ValueError("x"))
    seen: list[BaseException] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        for _ in range(200):
            try:
                raise raisable.take()  # its context is looked at
            except ValueError as error:
                seen.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(error) for error in seen}) == len(seen) == 1600
    assert {length(error.__traceback__) for error in seen} == {1}
