"""RRefs as arguments of TorchScript functions.

TorchScript's own type for RRefs is of torch's C++ and takes only torch's C++ RRefs. So annotations such as
`RRef[Tensor]` are compiled to a TorchScript class instead, which is generated for each kind of value. TorchScript makes
an instance of a class from any Python object that has the class's attributes; here there is one, an empty tensor that
carries the RRef as a Python attribute of its own, and the methods are Python functions that compiled code may call.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import types
import typing
from functools import cache
from typing import Any, get_origin

import torch
import torch.jit.annotations

from zrpc.rref.rref import RRef

_annotations: Any = torch.jit.annotations
_torch_rref_type: Any = getattr(torch._C, "RRefType", None)

_SOURCE = """
@torch.jit.ignore
def _to_here(link: Tensor, timeout: float) -> Value:
    return rref_of(link).to_here(timeout)


@torch.jit.ignore
def _local_value(link: Tensor) -> Value:
    return rref_of(link).local_value()


@torch.jit.ignore
def _owner_name(link: Tensor) -> str:
    return rref_of(link).owner_name()


@torch.jit.ignore
def _is_owner(link: Tensor) -> bool:
    return rref_of(link).is_owner()


@torch.jit.ignore
def _confirmed_by_owner(link: Tensor) -> bool:
    return rref_of(link).confirmed_by_owner()


@torch.jit.script
class ScriptRRef:
    def __init__(self, link: Tensor) -> None:
        self._script_link = link

    def to_here(self, timeout: float = -1.0) -> Value:
        return _to_here(self._script_link, timeout)

    def local_value(self) -> Value:
        return _local_value(self._script_link)

    def owner_name(self) -> str:
        return _owner_name(self._script_link)

    def is_owner(self) -> bool:
        return _is_owner(self._script_link)

    def confirmed_by_owner(self) -> bool:
        return _confirmed_by_owner(self._script_link)
"""
_numbers = itertools.count()


def install() -> None:
    """Let annotations name zrpc's RRefs, and compiled functions take them."""
    RRef._script_link = property(_link_of)  # type: ignore[attr-defined]  # an attribute for compiled code alone
    internal: Any = torch._jit_internal
    for module in (internal, _annotations):
        module.RRef = RRef
        module.is_rref = _is_rref
    internal.is_rref_instance = _is_rref_instance
    _annotations.RRefType = _type_of_rref


def _is_rref(annotation: Any) -> bool:
    if annotation is RRef:
        raise RuntimeError("RRef as an annotation must say what it refers to: for example RRef[int]")
    return get_origin(annotation) is RRef


def _is_rref_instance(obj: object) -> bool:
    return isinstance(obj, RRef)


def _type_of_rref(value_type: Any) -> Any:
    """The TorchScript type of an RRef whose value is of `value_type`."""
    try:
        cls = _class_for(value_type.annotation_str)
    except (NameError, SyntaxError, AttributeError):  # a class of the program: only torch's own RRefs can hold it
        return _torch_rref_type(value_type)
    return _annotations.try_ann_to_type(cls, None)


@cache
def _class_for(annotation: str) -> Any:
    name = f"zrpc.compat.generated_{next(_numbers)}"
    filename = f"<{name}>"
    module = types.ModuleType(name)
    module.__file__ = filename
    known = {**vars(typing), "Tensor": torch.Tensor, "Device": torch.device}
    vars(module).update(torch=torch, Tensor=torch.Tensor, Value=eval(annotation, known), rref_of=_rref_of)
    sys.modules[name] = module
    linecache.cache[filename] = (len(_SOURCE), None, _SOURCE.splitlines(keepends=True), filename)
    exec(compile(_SOURCE, filename, "exec", dont_inherit=True), vars(module))
    return vars(module)["ScriptRRef"]


def _link_of(rref: RRef[Any]) -> torch.Tensor:
    link = torch.empty(0)
    link.__dict__["rref"] = rref
    return link


def _rref_of(link: torch.Tensor) -> RRef[Any]:
    found: RRef[Any] = link.__dict__["rref"]
    return found
