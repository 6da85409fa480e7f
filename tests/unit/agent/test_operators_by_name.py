"""The operator path: names that come from other workers lead to operators of torch, and to nothing else."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from zrpc.agent import execution
from zrpc.errors import NotAllowedError, ProtocolError
from zrpc.wire import loading, pickling, values
from zrpc.wire.listed import ListedRules
from zrpc.wire.payload import Payload


def call(op: str, *args: Any) -> Any:
    return execution.execute_builtin(op, values.pack([list(args), {}]))


@pytest.mark.parametrize("op", ["aten::add", "aten::add.Tensor", "aten::sum", "aten::mul"])
def test_operators_and_their_overloads_are_run(op: str) -> None:
    """With and without the name of an overload."""
    tensor = torch.ones(2)
    assert torch.is_tensor(call(op, tensor) if op == "aten::sum" else call(op, tensor, tensor))


@pytest.mark.parametrize(
    "op",
    [
        "load_library::__call__", "import_module::__call__", "import_module::", "load_library", "::", "", "aten::",
        "aten", "__class__::mro", "__dict__::keys", "__file__::upper", "loaded_libraries::add", "aten::__class__",
        "aten::__init__", "aten::name", "aten::_dir", "aten::add.__call__", "aten::add.overloads", "aten::add._op",
        "aten::add.Nothing", "aten::add.", "aten::nothing", "nothing::add", "higher_order::cond", "a.b::c",
        "aten::a::b", "aten::Tensor", "aten::__qualname__", "classes::profiling", "_path::join",
    ],
)  # fmt: skip
def test_other_attributes_of_torch_ops_are_no_operators(op: str) -> None:
    """They are refused before anything is called, however they are named."""
    if op == "aten::add.":  # no overload is named
        assert call(op, torch.ones(1), 1).tolist() == [2]
        return
    with pytest.raises(ProtocolError, match="has no operator"):
        call(op, "nothing")


def test_arguments_of_operators_are_never_unpickled() -> None:
    """A call of an operator takes packed values, whatever the stream says."""
    for payload in (Payload(pickle.dumps(([torch.ones(1)], {}))), pickling.dumps(([{1}], {}))):
        with pytest.raises(ProtocolError):
            execution.execute_builtin("aten::sum", payload)


def test_a_rule_holds_for_operators() -> None:
    """Those that open files are refused, unless torch.ops.aten is listed; what was found before is forgotten."""
    execution.forget_operators()
    loading.use(ListedRules("callee", []))
    try:
        assert call("aten::add", torch.ones(1), 1).tolist() == [2]
        with pytest.raises(NotAllowedError, match="from_file"):
            call("aten::from_file", "/nowhere", False, 1)
    finally:
        loading.use(None)
        execution.forget_operators()
