"""How TorchScript travels: a function by its qualified name, which both sides must have compiled; a module as saved.

Importing this module is what makes them travel.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import torch

from zrpc.errors import SerializationError
from zrpc.wire import loading
from zrpc.wire.compilations import compilations
from zrpc.wire.reducers import Reduced, note_cut_off, register_reducer

_ROOT = "__torch__."
_jit: Any = torch.jit  # parts of it are untyped


def qualified_name(function: Any) -> str:
    """The name by which TorchScript knows `function`."""
    return str(torch._jit_internal._qualified_name(function))


def find_function(name: str) -> Any:
    """The compiled function of that qualified name, in this process. One that is being compiled is waited for.

    Raises:
        SerializationError: there is none.
    """
    found = _find(name)
    if found is not None:
        return found
    module, _, attribute = name.removeprefix(_ROOT).rpartition(".")
    try:
        importlib.import_module(module)  # compiles the functions of that module
    except (ImportError, ValueError) as error:
        raise SerializationError(
            f"the module of the TorchScript function {name} cannot be imported: {error}"
        ) from error
    found = _find(name)
    if found is None:
        raise SerializationError(
            f"attempted to get undefined function {attribute}: there is no TorchScript function {name} here. Compile "
            f"{attribute} with torch.jit.script at the top level of {module}, which caller and callee both import"
        )
    return found


def _find(name: str) -> Any:
    """The compiled function of that qualified name; None: there is none, or it could not be compiled."""
    found: Any = torch.jit._state._python_cu.find_function(name)
    if found is None:
        return None
    compilations.wait(name)
    is_whole = any(True for _ in found.graph.outputs())  # TorchScript keeps the beginning of one that it cannot compile
    return found if is_whole else None


def _compile(name: str, *args: Any) -> Any:
    with compilations.under_way(name):
        return _compile_of_torch(name, *args)


def _received_function(name: str) -> Any:
    module, _, attribute = str(name).removeprefix(_ROOT).rpartition(".")
    loading.check(module, attribute)
    return find_function(name)


def _reduce_function(function: Any) -> Reduced:
    return _received_function, (qualified_name(function),)


def _reduce_module(module: Any) -> Reduced:
    if any(parameter.requires_grad for parameter in module.parameters()):
        note_cut_off()
    saved = io.BytesIO()
    torch.jit.save(module, saved)
    return _load_module, (saved.getvalue(),)


def _reduce_bare_module(module: Any) -> Reduced:
    """What compiled code returns of a module."""
    return _reduce_module(_jit._recursive.wrap_cpp_module(module))


def _load_module(saved: bytes) -> Any:
    loading.check("torch.jit", "load")  # what is saved has code in it
    return _jit.load(io.BytesIO(saved))


_native: Any = torch._C
_compile_of_torch = _native._jit_script_compile
_native._jit_script_compile = _compile
register_reducer(torch.jit.ScriptFunction, _reduce_function)
register_reducer(torch._C.ScriptModule, _reduce_bare_module)
for _cls in (_jit.RecursiveScriptModule, _jit.TopLevelTracedModule):
    register_reducer(_cls, _reduce_module)
