"""Functions and classes without a name that others know travel as code."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zrpc.errors import SerializationError
from zrpc.wire import by_value, pickling
from zrpc.wire.payload import Payload

STEP = 3


def again(payload: Payload) -> Any:
    return pickling.loads(Payload(payload.data, payload.tensors, payload.buffers))


def test_lambdas_closures_and_local_classes_travel() -> None:
    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def plus(self, other: int) -> int:
            return self.value + other + STEP

    many = 5
    impostor = types.FunctionType(_plus.__code__, globals(), "_plus")
    calls: list[tuple[Any, tuple[int, ...]]] = [(lambda x: x + many, (2,)), (Local(2).plus, (2,)), (impostor, (4,))]
    for function, args in calls:
        made, given, _ = again(pickling.dumps_call((function, args, {})))
        assert made(*given) == 7
    assert again(pickling.dumps(Local(4))).plus(0) == 7


def _plus(x: int) -> int:
    return x + STEP


def test_tensors_and_arrays_in_closures_travel_beside_the_code() -> None:
    tensor, array = torch.ones(100_000), np.ones(100_000)
    payload = pickling.dumps_call((lambda: (tensor, array), (), {}))
    assert payload.tensors == [tensor] or payload.tensors[0] is tensor
    assert len(payload.data) < 5_000
    assert sum(memoryview(buffer).nbytes for buffer in payload.buffers) == array.nbytes
    made, _, _ = again(payload)
    assert all((got == 1).all() for got in made())


def test_open_files_do_not_travel() -> None:
    """cloudpickle alone would read what is left of one, and send that."""
    with Path(__file__).open() as file, pytest.raises(SerializationError, match=r"cannot pickle '_io\.TextIOWrapper'"):
        pickling.dumps(lambda: file)


def test_what_has_a_name_travels_by_it_though_cloudpickle_is_there() -> None:
    payload = pickling.dumps_call((_plus, ([1],), {}))
    assert b"cloudpickle" not in payload.data
    assert again(payload)[0] is _plus


def test_without_cloudpickle_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_value, "pickler_class", lambda: None)
    with pytest.raises(SerializationError, match=r"pip install zrpc\[by-value\]"):
        pickling.dumps(lambda: 0)
    with pytest.raises(SerializationError, match=r"install cloudpickle \(`zrpc\[by-value\]`\)"):
        pickling.dumps_by_value(lambda: 0)


def test_a_main_module_is_known_by_its_file_or_its_code(tmp_path: Path) -> None:
    """The same script is the same everywhere; so is the same code given with -c."""
    script, other = tmp_path / "a.py", tmp_path / "b.py"
    tell = "from zrpc.wire import by_value; print(by_value.identity())"
    for file in (script, other):
        file.write_text(tell)
    ways = ([str(script)], [str(script), "argument"], [str(other)], ["-c", tell], ["-c", tell], ["-c", tell + " "])
    told = [subprocess.run([sys.executable, *way], capture_output=True, text=True, check=True).stdout for way in ways]
    assert told[0] == told[1] != told[2]
    assert told[3] == told[4] != told[5]
    assert len(set(told)) == 4
