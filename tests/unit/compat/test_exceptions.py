"""Remote exceptions that torch cannot raise again."""

from __future__ import annotations

import pytest

from zrpc.compat.exceptions import as_torch_raises
from zrpc.errors import PeerLostError


class TwoArgumentsError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class TwoArgumentsLookupError(KeyError):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


REMOTE = "On WorkerInfo(id=1, name=worker1):\nTraceback: TwoArgumentsError: gone"


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError(2, "x"), PeerLostError("x")])
def test_what_takes_one_string_stays_as_it_is(error: Exception) -> None:
    assert as_torch_raises(error, REMOTE) is error


@pytest.mark.parametrize("cls", [TwoArgumentsError, TwoArgumentsLookupError])
def test_others_are_runtime_errors_too(cls: type[Exception]) -> None:
    raised = as_torch_raises(cls(7, "gone"), REMOTE)
    assert isinstance(raised, cls)
    assert isinstance(raised, RuntimeError)
    assert type(raised).__name__ == cls.__name__
    assert raised.args == ("gone",)
    assert vars(raised)["code"] == 7
    assert "Original exception on remote side was" in str(raised)
    assert REMOTE in str(raised)


class FinalError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)

    def __init_subclass__(cls) -> None:
        raise TypeError("there is no class below this one")


def test_where_one_object_cannot_be_both_it_is_a_runtime_error() -> None:
    error = FinalError(1, "gone")
    raised = as_torch_raises(error, REMOTE)
    assert type(raised) is RuntimeError
    assert REMOTE in str(raised)
