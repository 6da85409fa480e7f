"""The names that received streams may hold although no user listed them: what tensors and zrpc itself travel as.

Each is a pair of module and name, never a whole module. None of them leads to others: what is named here makes data, is
a constant, or is a function of zrpc that checks what it is given.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch

from zrpc import errors

_CONSTANTS: Any = torch.dtype | torch.layout | torch.memory_format | torch.qscheme

_BUILTINS = (
    "Ellipsis", "NotImplemented", "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
    "object", "range", "set", "slice", "str", "tuple",
)  # fmt: skip

_TORCH = (
    ("torch", "Size"), ("torch", "Tensor"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("torch.nn.parameter", "Buffer"), ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "UninitializedBuffer"), ("torch.nn.parameter", "UninitializedParameter"),
)  # fmt: skip

_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam",
)  # fmt: skip

_NUMPY = (
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
)  # fmt: skip

_COLLECTIONS = ("Counter", "OrderedDict", "defaultdict", "deque")

_ZRPC = (
    ("zrpc.wire.reducers", "_set_attributes"), ("zrpc.wire.reducers", "_tensor_at"),
    ("zrpc.wire.reducers", "exception_of"), ("zrpc.wire.exception_fields", "Unsent"),
    ("zrpc.wire.arrays", "_make"), ("zrpc.wire.storages", "_storage_of"), ("zrpc.wire.storages", "_typed"),
    ("zrpc.wire.values", "torch_constant"), ("zrpc.wire.subclasses", "_make"), ("zrpc.wire.subclasses", "set_state"),
    ("zrpc.wire.scripting", "_load_module"), ("zrpc.wire.scripting", "_received_function"),
    ("zrpc.ids", "WorkerInfo"), ("zrpc.ids", "GlobalId"),
    ("zrpc.rref.travel", "_rebuild"), ("zrpc.rref.rref", "RRef"), ("zrpc.rref.rref", "_rref_typeof_on_owner"),
    ("zrpc.rref.proxy", "_local_invoke"), ("zrpc.rref.proxy", "_local_invoke_async_execution"),
    ("zrpc.gather", "_conclude"), ("zrpc.gather", "_contribute"), ("zrpc.gather", "_give_up"),
    ("zrpc.gather", "_missing"), ("zrpc.gathering", "Key"), ("zrpc.gathering", "Lost"),
    ("zrpc.optim.distributed_optimizer", "_make"), ("zrpc.optim.distributed_optimizer", "_make_functional"),
    ("zrpc.optim.distributed_optimizer", "_step"),
    ("zrpc.nn.remote_module", "_create_module"), ("zrpc.nn.remote_module", "_create_module_with_interface"),
    ("zrpc.nn.remote_module", "_param_rrefs"), ("zrpc.nn.remote_module", "_parameter_rrefs"),
    ("zrpc.nn.remote_module", "_rebuild_remote_module"), ("zrpc.nn.remote_module", "_rebuild_script_module"),
    ("zrpc.nn.remote_module", "_run_forward"), ("zrpc.nn.remote_module", "_set_training"),
    ("zrpc.compat.rpc.api", "_broadcast_to_followers"), ("zrpc.compat.rpc.api", "_gather_to_leader"),
    ("zrpc.compat.rpc.internal", "PythonUDF"),
)  # fmt: skip


def _classes(module: Any, base: type) -> set[tuple[str, str]]:
    found = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, base)]
    return {(one.__module__, one.__qualname__) for one in found}


OPTIMIZERS = frozenset(
    (cls.__module__, cls.__qualname__) for name in _OPTIMIZERS if (cls := getattr(torch.optim, name, None)) is not None
)
"""torch's own optimizers: what a `DistributedOptimizer` makes on the owners of parameters."""

EXCEPTIONS = frozenset(_classes(builtins, BaseException) | _classes(errors, errors.ZrpcError))
"""Classes of exceptions of the interpreter and of zrpc."""

ALLOWED_NAMES = frozenset(
    {
        *_TORCH,
        *_NUMPY,
        *_ZRPC,
        *(("builtins", name) for name in _BUILTINS),
        *(("collections", name) for name in _COLLECTIONS),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, _CONSTANTS)),
    }
    | OPTIMIZERS
    | EXCEPTIONS
)
"""All of them."""

FILE_OPERATORS = frozenset({"from_file", "save"})
"""Operators of torch's own (`aten`) that open a file that their argument names."""
