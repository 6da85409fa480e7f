"""Results of TorchScript functions that stay TorchScript values."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from zrpc.agent.scripted import ScriptValue, call_and_keep, check_arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

Args = tuple[int, ...]
Kwargs = dict[str, int]


@pytest.fixture
def scripts() -> Any:
    """The TorchScript functions: compiled here, where the warning is ignored."""
    return importlib.import_module("tests.unit.agent.scripts")


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [((1,), {}, [1, 5]), ((1, 2), {}, [1, 2]), ((), {"first": 3}, [3, 5]), ((1,), {"second": 4}, [1, 4])],
)
def test_a_list_stays_what_compiled_code_made(scripts: Any, args: Args, kwargs: Kwargs, expected: list[int]) -> None:
    """Python gets copies; compiled code gets the value, and what it changes is there for all."""
    kept = call_and_keep(scripts.numbers, args, kwargs)
    assert isinstance(kept, ScriptValue)
    kept.to_python().append(7)
    assert kept.to_python() == expected
    assert scripts.extend(kept.future) == 3
    assert kept.to_python() == [*expected, 9]


def test_an_empty_list_has_its_type(scripts: Any) -> None:
    """The type is that which the function declares."""
    kept = call_and_keep(scripts.nothing, (), {})
    assert scripts.extend(kept.future) == 1
    assert kept.to_python() == [9]


def test_tensors_come_out(scripts: Any) -> None:
    """What is the same object in Python is not held back."""
    x = call_and_keep(scripts.double, (torch.ones(2),), {})
    assert x.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((1, 2, 3), {}, r"numbers\(\) expected at most 2 argument\(s\) but received 3"),
        ((1,), {"third": 3}, "Unknown keyword argument 'third'"),
        ((), {}, "misses arguments"),
        ((1,), {"first": 1}, "given one twice"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(scripts: Any, args: Args, kwargs: Kwargs, text: str) -> None:
    """How many there are and what they are called is checked, and the error has the declaration."""
    with pytest.raises(RuntimeError, match=text):
        check_arguments(scripts.numbers, args, kwargs)
    with pytest.raises(RuntimeError, match="numbers"):
        call_and_keep(scripts.numbers, args, kwargs)
