"""The pickler of calls with torch's methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zrpc.compat.rpc.internal import (
    PythonUDF,
    RPCExecMode,
    _build_rpc_profiling_key,
    _internal_rpc_pickler,
    _start_record_function,
    deserialize,
    serialize,
)


def test_a_call_is_a_stream_and_its_tensors() -> None:
    tensor = torch.arange(3)
    data, tensors = serialize(PythonUDF(max, (tensor, {"array": np.arange(4)}), None))
    assert len(tensors) == 1
    func, args, kwargs = deserialize(data, tensors)
    assert func is max
    assert args[0] is tensor
    assert args[1]["array"].tolist() == [0, 1, 2, 3]
    assert kwargs is None


@pytest.mark.parametrize("value", [None, 5, "text", [1, (2, 3)]])
def test_every_value_is_a_stream(value: object) -> None:
    data, tensors = serialize(value)
    assert data
    assert deserialize(data, tensors) == value


def test_one_tensor_is_a_stream_too() -> None:
    tensor = torch.ones(2)
    data, tensors = serialize(tensor)
    assert data
    assert deserialize(data, tensors) is tensor


class Registered:
    pass


def test_the_first_reducer_of_a_class_stays() -> None:
    _internal_rpc_pickler._register_reducer(Registered, lambda _: (str, ("first",)))
    _internal_rpc_pickler._register_reducer(Registered, lambda _: (str, ("second",)))
    assert deserialize(*serialize(Registered())) == "first"


def test_calls_have_torchs_names_in_profiles() -> None:
    key = _build_rpc_profiling_key(RPCExecMode.ASYNC, "aten::add", "worker0", "worker1")
    assert key == "rpc_async#aten::add(worker0 -> worker1)"


def test_a_record_function_needs_a_profiler() -> None:
    with pytest.raises(AssertionError, match="profiler should be enabled"):
        _start_record_function(RPCExecMode.SYNC, "f", "worker0", "worker1")
