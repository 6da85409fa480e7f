"""Exceptions arrive as what they were, or else as a `RemoteError` that tells of them."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.unit.wire.travel import sent, travel
from zrpc.errors import ProtocolError, RemoteError, RpcTimeoutError
from zrpc.ids import WorkerInfo
from zrpc.wire import pickling
from zrpc.wire.exceptions import RemoteTraceback, dump_exception, load_exception, remote_traceback

if TYPE_CHECKING:
    from collections.abc import Callable

WORKER = WorkerInfo("callee", 3)


def raised(error: BaseException) -> BaseException:
    """`error` with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


def roundtrip(error: BaseException) -> BaseException:
    failure, payload = dump_exception(raised(error))
    return load_exception(WORKER, failure, travel(payload))


class Plain(Exception):
    pass


class TwoArguments(Exception):
    """Its constructor takes other arguments than it passes on."""

    def __init__(self, code: int, *, where: str) -> None:
        super().__init__(f"code {code} at {where}")
        self.code = code
        self.where = where


class Reducing(Exception):
    """It says itself how it is pickled."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return Reducing, (self.code,)


class BadReducing(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        raise ValueError("no")


class SystemTrouble(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(5, "it broke", path)
        self.path = path


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class NewArguments(Exception):
    def __new__(cls, a: int, b: int) -> NewArguments:
        return super().__new__(cls, a + b)

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a + b)


class Sealed(Exception):
    @property
    def code(self) -> int:
        return 7


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        ValueError(),
        ValueError("two", 2),
        KeyError("a"),
        KeyError(("a", 1)),
        ZeroDivisionError("x"),
        StopIteration(5),
        RuntimeError("with a tensor's shape", torch.Size([1])),
        Plain("p", [1]),
        RpcTimeoutError("of zrpc"),
        torch.OutOfMemoryError("no memory"),
        AssertionError(),
        NotImplementedError("later"),
        IndexError("list index out of range"),
        Reducing(4),
        TwoArguments(4, where="there"),
    ],
    ids=repr,
)
def test_class_arguments_and_text_arrive(error: Exception) -> None:
    after = roundtrip(error)
    assert type(after) is type(error)
    assert after.args == error.args
    assert str(after) == str(error)
    assert vars(after) == vars(error)
    with pytest.raises(type(error)):
        raise after


def test_attributes_and_notes_arrive() -> None:
    error = Plain("x")
    error.detail = {"rows": [1, 2]}  # type: ignore[attr-defined]
    error.add_note("look at the log")
    after = roundtrip(error)
    assert after.detail == {"rows": [1, 2]}  # type: ignore[attr-defined]
    assert after.__notes__ == ["look at the log"]


def test_fields_of_the_interpreters_classes_arrive() -> None:
    missing = roundtrip(FileNotFoundError(2, "No such file", "/some/where"))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file", "/some/where")
    assert str(missing) == "[Errno 2] No such file: '/some/where'"
    trouble = roundtrip(SystemTrouble("/dev/x"))
    assert isinstance(trouble, SystemTrouble)
    assert (trouble.errno, trouble.filename, trouble.path) == (5, "/dev/x", "/dev/x")
    assert trouble.args == (5, "it broke")
    decode = roundtrip(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    assert isinstance(decode, UnicodeDecodeError)
    assert decode.object == b"\xff"
    lost = roundtrip(ImportError("no such module", name="thing", path="/p"))
    assert isinstance(lost, ImportError)
    assert (lost.name, lost.path) == ("thing", "/p")
    stop = roundtrip(StopIteration(5))
    assert isinstance(stop, StopIteration)
    assert stop.value == 5
    both = roundtrip(ExceptionGroup("both", [ValueError(1), KeyError("k")]))
    assert isinstance(both, ExceptionGroup)
    assert [type(one) for one in both.exceptions] == [ValueError, KeyError]


def test_classes_of_the_standard_library_with_constructors_of_their_own_arrive() -> None:
    document = roundtrip(json.JSONDecodeError("bad", "{", 1))
    assert isinstance(document, json.JSONDecodeError)
    assert (document.pos, document.lineno) == (1, 1)
    ended = roundtrip(subprocess.CalledProcessError(3, ["cmd"], output=b"out"))
    assert isinstance(ended, subprocess.CalledProcessError)
    assert (ended.returncode, ended.cmd, ended.output) == (3, ["cmd"], b"out")


def test_the_remote_traceback_is_the_last_of_the_causes() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as outer:
        after = roundtrip(outer)
    assert isinstance(after.__cause__, KeyError)
    assert after.__cause__.args == ("inner",)
    remote = after.__cause__.__cause__
    assert isinstance(remote, RemoteTraceback)
    assert remote_traceback(after) is remote
    assert remote.worker == WORKER
    assert str(remote).startswith("On WorkerInfo(id=3, name=callee):")
    for words in ("KeyError: 'inner'", "direct cause", "ValueError: outer", "test_exceptions.py"):
        assert words in remote.text


def test_the_traceback_of_a_second_worker_replaces_that_of_the_first_which_it_tells() -> None:
    once = roundtrip(ValueError("x"))
    assert isinstance(once.__cause__, RemoteTraceback)
    twice = roundtrip(once)
    assert isinstance(twice.__cause__, RemoteTraceback)
    assert once.__cause__.text in twice.__cause__.text
    assert twice.__cause__.__cause__ is None


def test_attributes_that_cannot_travel_are_left_behind() -> None:
    error = Plain("x", 2)
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    after = roundtrip(error)
    assert type(after) is Plain
    assert after.args == ("x", 2)
    assert not hasattr(after, "lock")
    assert isinstance(roundtrip(BadReducing("y")), BadReducing)


def _local_class() -> type[Exception]:
    class Local(Exception):
        pass

    return Local


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_local_class()("here"), "Local: here"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_rebuilt_arrives_as_a_remote_error_that_tells_of_it(error: BaseException, words: str) -> None:
    after = roundtrip(error)
    assert isinstance(after, RemoteError)
    assert words in str(after)
    assert "On WorkerInfo(id=3, name=callee)" in str(after)
    assert "Traceback" in str(after)
    assert isinstance(after.__cause__, RemoteTraceback)


def test_an_exception_without_text_arrives() -> None:
    failure, _ = dump_exception(raised(Unprintable("x")))
    assert "cannot be made: ValueError('no text')" in failure.text
    after = roundtrip(Unprintable("x"))
    assert type(after) is Unprintable
    assert after.args == ("x",)


def test_an_attribute_behind_a_property_without_setter_arrives_where_it_was() -> None:
    error = Sealed("x")
    vars(error)["code"] = 3
    after = roundtrip(error)
    assert type(after) is Sealed
    assert vars(after) == {"code": 3}
    assert after.code == 7


def test_constructors_of_users_classes_are_not_called() -> None:
    after = roundtrip(NewArguments(1, 2))
    assert type(after) is NewArguments
    assert after.args == (3,)


def test_an_argument_that_cannot_be_pickled_is_replaced_by_its_text() -> None:
    lock = threading.Lock()
    after = roundtrip(Plain(lock, 2))
    assert type(after) is Plain
    assert repr(after.args[0]) == repr(lock)
    assert after.args[1] == 2


def test_failures_whose_class_is_missing_here_arrive_as_remote_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    failure, payload = dump_exception(raised(Plain("gone")))
    monkeypatch.delattr(f"{__name__}.Plain")
    after = load_exception(WORKER, failure, travel(payload))
    assert isinstance(after, RemoteError)
    assert type(after).__name__ == "Plain"
    assert "Plain: gone" in str(after)


def test_a_payload_that_is_no_exception_makes_a_remote_error() -> None:
    failure, _ = dump_exception(raised(Plain("x")))
    oddities: list[Any] = [5, (int, (3,), {}), (Plain,), Plain, [Plain("x")]]
    for odd in oddities:
        assert type(load_exception(WORKER, failure, pickling.dumps(odd))) is RemoteError


class Short(Exception):
    """Its text is short, whatever it holds."""

    def __str__(self) -> str:
        return "short"


@pytest.mark.parametrize(
    ("error", "held"),
    [
        (lambda: Short(b"x" * 500_000), lambda error: error.args == (b"x" * 500_000,)),
        (lambda: Short("x" * 500_000), lambda error: error.args == ("x" * 500_000,)),
        (lambda: Short(list(range(100_000))), lambda error: error.args == (list(range(100_000)),)),
        (lambda: Short([Short(b"x" * 500_000)]), lambda error: error.args[0][0].args == (b"x" * 500_000,)),
        (
            lambda: Short(np.arange(100_000), b"x" * 500_000),
            lambda error: error.args[0].sum() == sum(range(100_000)) and error.args[1] == b"x" * 500_000,
        ),
        (
            lambda: Short(torch.arange(1000), b"x" * 500_000),
            lambda error: error.args[0].sum() == sum(range(1000)) and error.args[1] == b"x" * 500_000,
        ),
        (
            lambda: ExceptionGroup("g", [Short(number, b"x" * 50_000) for number in range(10)]),
            lambda error: [one.args[0] for one in error.exceptions] == list(range(10)),
        ),
    ],
)
def test_a_large_exception_does_not_travel_in_the_frame_that_the_reading_thread_decodes(
    error: Callable[[], BaseException], held: Callable[[Any], bool]
) -> None:
    """It is a buffer of its own, as outcome of a call and within a value, and arrives as it was."""
    failure, payload = dump_exception(error())
    as_value = pickling.dumps({"error": error(), "rest": b"y" * 200_000})
    for each in (payload, as_value):
        assert len(sent(each)[0]) < 4096
    assert held(load_exception(WORKER, failure, travel(payload)))
    value = pickling.loads(travel(as_value))
    assert held(value["error"])
    assert value["rest"] == b"y" * 200_000


def test_a_table_of_exceptions_that_is_not_there_is_refused() -> None:
    """The index of its buffer is of a peer, and may be any number."""
    _, payload = dump_exception(Short(b"x" * 500_000))
    arrived = travel(payload)
    arrived.buffers = []
    with pytest.raises(ProtocolError, match="a table of exceptions cannot be read: IndexError"):
        pickling.loads(arrived)
