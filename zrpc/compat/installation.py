"""Putting zrpc where torch.distributed.rpc and its kin are looked up.

Names are looked up in four places: in `sys.modules`, by import statements; in packages, as attributes (`dist.rpc`); in
torch's C++ modules; and in modules that imported something from the former before. `install` sees to each.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from zrpc.compat import native

RPC = "torch.distributed.rpc"
AUTOGRAD = "torch.distributed.autograd"
OPTIM = "torch.distributed.optim"
OPTIMIZER = "torch.distributed.optim.optimizer"

MODULES = {
    RPC: "zrpc.compat.rpc",
    **{
        f"{RPC}.{name}": f"zrpc.compat.rpc.{name}"
        for name in (
            "_testing",
            "_utils",
            "api",
            "backend_registry",
            "constants",
            "functions",
            "internal",
            "options",
            "rref_proxy",
            "server_process_global_profiler",
        )
    },
    AUTOGRAD: "zrpc.compat.autograd",
    "torch.distributed.nn.api.remote_module": "zrpc.nn.remote_module",
    OPTIMIZER: "zrpc.compat.optimizer",
}
"""Name to import by -> zrpc's module."""

ATTRIBUTES = {
    "torch.distributed.optim": {"DistributedOptimizer": "zrpc.compat.optimizer"},
    "torch.distributed.nn": {"RemoteModule": "zrpc.nn.remote_module"},
    "torch.nn.parallel.distributed": {"RRef": "zrpc.rref.rref", "RPC_AVAILABLE": "zrpc.compat.native"},
}
"""Module of torch -> names in it, each with the module of zrpc that has the replacement under the same name."""

Replaced = list[tuple[Any, Any]]
"""What was replaced, and by what."""


def replace_modules() -> Replaced:
    """Put zrpc's modules in place of torch's."""
    old = {name: sys.modules[name] for name in MODULES if name in sys.modules}
    for name, ours in MODULES.items():
        sys.modules[name] = importlib.import_module(ours)
    for name in MODULES:
        parent, _, leaf = name.rpartition(".")
        if parent not in MODULES and not _is_late(parent):
            setattr(importlib.import_module(parent), leaf, sys.modules[name])
    replaced: Replaced = []
    for name, module in old.items():
        replaced.append((module, sys.modules[name]))
        replaced += _replaced_names(module, sys.modules[name])
    return replaced


def replace_attributes() -> Replaced:
    """Put zrpc's names into modules of torch that are otherwise left as they are."""
    replaced: Replaced = []
    for name, attributes in ATTRIBUTES.items():
        if _is_late(name):
            continue
        module = importlib.import_module(name)
        for attribute, home in attributes.items():
            new = getattr(importlib.import_module(home), attribute)
            replaced.append((getattr(module, attribute, None), new))
            setattr(module, attribute, new)
    return replaced


def _is_late(module: str) -> bool:
    """Whether the module takes a second to import and will find zrpc's names by itself when it is imported."""
    return module == OPTIM and module not in sys.modules and hasattr(torch._C, "_rpc_init")


def replace_native() -> Replaced:
    """Put zrpc's names into torch's C++ modules, if this torch has them."""
    replaced: Replaced = []
    for module_name, names in native.NAMES.items():
        module: ModuleType | None = getattr(torch._C, module_name, None)
        if module is None:
            continue
        for name, new in names.items():
            replaced.append((getattr(module, name, None), new))
            setattr(module, name, new)
    return replaced


def rebind(replaced: Replaced) -> None:
    """Replace what modules imported before: their global names that are bound to what was replaced."""
    new_of = {id(old): new for old, new in replaced if _is_rebindable(old) and old is not new}
    ours = {id(module) for name, module in sys.modules.items() if name in MODULES}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or id(module) in ours or module.__name__.startswith("torch._C"):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in new_of:
                setattr(module, name, new_of[id(value)])


def _is_rebindable(old: object) -> bool:
    """Numbers and strings may be anybody's."""
    return isinstance(old, ModuleType) or callable(old)


def _replaced_names(old: ModuleType, new: ModuleType) -> Replaced:
    """What is defined in `old` or in torch's C++ modules and is in `new` too."""
    homes = (RPC, AUTOGRAD, "torch.distributed.nn.api", OPTIMIZER, "torch._C._distributed_")
    return [
        (value, getattr(new, name))
        for name, value in vars(old).items()
        if hasattr(new, name) and str(getattr(value, "__module__", "")).startswith(homes)
    ]
