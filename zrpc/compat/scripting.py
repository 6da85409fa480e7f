"""RRefs as arguments of TorchScript functions.

TorchScript's own type for RRefs is of torch's C++ and takes only torch's C++ RRefs. So annotations such as
`RRef[Tensor]` are compiled to a TorchScript class instead, which is generated for each kind of value. TorchScript makes
an instance of a class from any Python object that has the class's attributes; here there is one, the link of the RRef
(`zrpc.compat.script_links`), and the methods are Python functions that compiled code may call.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import types
import typing
from typing import TYPE_CHECKING, Any, get_args, get_origin

import torch
import torch.jit.annotations

from zrpc.agent.scripted import is_copied
from zrpc.compat import script_links
from zrpc.rref.rref import RRef

if TYPE_CHECKING:
    from collections.abc import Mapping

_annotations: Any = torch.jit.annotations

_SOURCE = """
@torch.jit.ignore
def _fetch(link: Tensor, timeout: float) -> Future[Any]:
    return fetch(link, timeout)


@torch.jit.ignore
def _take(done: Any) -> Value:
    return take(done)


@torch.jit.ignore
def _kept(link: Tensor, timeout: float) -> Kept:
    return kept_of(link, timeout, wrap)


@torch.jit.ignore
def _owner_name(link: Tensor) -> str:
    return rref_of(link).owner_name()


@torch.jit.ignore
def _is_owner(link: Tensor) -> bool:
    return rref_of(link).is_owner()


@torch.jit.ignore
def _confirmed_by_owner(link: Tensor) -> bool:
    return rref_of(link).confirmed_by_owner()


def _same(value: Value) -> Value:
    return value


@torch.jit.script
def wrap(value: Value) -> Future[Value]:
    return torch.jit.fork(_same, value)


@torch.jit.ignore
def _refuse() -> Tensor:
    return refuse()


@torch.jit.script
class ScriptRRef:
    def __init__(self, link: Tensor) -> None:
        self._script_link = link

    def __getstate__(self) -> Tensor:
        return _refuse()

    def __setstate__(self, link: Tensor) -> None:
        self._script_link = link

    def to_here(self, timeout: float = -1.0) -> Value:
        if _is_owner(self._script_link):
            return _kept(self._script_link, timeout)GET
        return _take(_fetch(self._script_link, timeout).wait())

    def local_value(self) -> Value:
        return _kept(self._script_link, -1.0)GET

    def owner_name(self) -> str:
        return _owner_name(self._script_link)

    def owner(self) -> str:
        return _owner_name(self._script_link)

    def is_owner(self) -> bool:
        return _is_owner(self._script_link)

    def confirmed_by_owner(self) -> bool:
        return _confirmed_by_owner(self._script_link)


@torch.jit.script
def from_link(link: Tensor) -> ScriptRRef:
    return ScriptRRef(link)


@torch.jit.script
def to_here(rref: ScriptRRef, timeout: float) -> Value:
    return rref.to_here(timeout)


@torch.jit.script
def local_value(rref: ScriptRRef) -> Value:
    return rref.local_value()


@torch.jit.script
def owner_name(rref: ScriptRRef) -> str:
    return rref.owner_name()


@torch.jit.script
def is_owner(rref: ScriptRRef) -> bool:
    return rref.is_owner()


@torch.jit.script
def confirmed_by_owner(rref: ScriptRRef) -> bool:
    return rref.confirmed_by_owner()


owner = owner_name


@torch.jit.ignore
def _end(link: Tensor) -> int:
    return end(link)


@torch.jit.script
def end_of_use(rref: ScriptRRef) -> int:
    return _end(rref._script_link)
"""
_numbers = itertools.count()


_helpers: dict[str, Any] = {}
"""The TorchScript type of a value -> a module with the class of RRefs to such values."""


def install() -> None:
    """Let annotations name zrpc's RRefs, and compiled functions take them and return them."""
    RRef._script_link = property(script_links.link_of)  # type: ignore[attr-defined]  # an attribute for compiled code alone
    internal: Any = torch._jit_internal
    for module in (internal, _annotations):
        module.RRef = RRef
        module.is_rref = _is_rref
    internal.is_rref_instance = _is_rref_instance
    plain = _annotations.try_ann_to_type

    def try_ann_to_type(ann: Any, loc: Any, rcb: Any = None) -> Any:
        if _is_rref(ann):
            (value,) = get_args(ann)
            return plain(class_for(try_ann_to_type(value, loc, rcb), value), loc)
        return plain(ann, loc, rcb)

    native: Any = torch._C
    infer = native._jit_try_infer_type

    def infer_type(obj: Any) -> Any:
        inferred = _rref_type_of(obj)
        return infer(obj) if inferred is None else native.InferredType(inferred)

    native._jit_try_infer_type = infer_type
    _annotations.try_ann_to_type = try_ann_to_type
    _annotations.RRefType = _type_of_rref


def _is_rref(annotation: Any) -> bool:
    if annotation is RRef:
        raise RuntimeError("RRef as an annotation must say what it refers to: for example RRef[int]")
    return get_origin(annotation) is RRef


def _is_rref_instance(obj: object) -> bool:
    return isinstance(obj, RRef)


def _rref_type_of(obj: object) -> Any:
    """The TorchScript type of an RRef, or of a list of RRefs, that is an attribute of a module; None: it is no such."""
    if isinstance(obj, list) and obj and all(isinstance(one, RRef) for one in obj):
        inner = _rref_type_of(obj[0])
        return None if inner is None else torch._C.ListType(inner)
    if not isinstance(obj, RRef):
        return None
    of_value = _annotations.try_ann_to_type(obj._get_type(), None)  # asks the owner
    return None if of_value is None else _type_of_rref(of_value)


def _type_of_rref(value_type: Any) -> Any:
    """The TorchScript type of an RRef whose value is of `value_type`."""
    return _annotations.try_ann_to_type(class_for(value_type, None), None)


def class_for(value_type: Any, annotation: Any) -> Any:
    """The TorchScript class of RRefs to values of a type.

    Args:
        value_type: the type.
        annotation: what Python calls it; None: to be found out.

    Raises:
        RuntimeError: that cannot be found out.
    """
    key = value_type.annotation_str
    if key not in _helpers:
        _helpers[key] = _make_helpers(_annotation_of(key) if annotation is None else annotation, is_copied(value_type))
    return _helpers[key].ScriptRRef


def helpers_named(annotation_str: str) -> Any:
    """A module with the class of RRefs to values of that type, and compiled functions that call its methods.

    Raises:
        RuntimeError: it is not known, and cannot be found out, what Python calls the type.
    """
    if annotation_str not in _helpers:
        annotation = _annotation_of(annotation_str)
        class_for(_annotations.try_ann_to_type(annotation, None), annotation)
    return _helpers[annotation_str]


def helpers_of(rref_type: Any) -> Any:
    """As `helpers_named`, for the type of such RRefs; None: it is another type."""
    if rref_type.kind() != "ClassType":
        return None
    name = rref_type.qualified_name()
    return next((made for made in _helpers.values() if name == f"__torch__.{made.__name__}.ScriptRRef"), None)


def type_of(helpers: Any) -> Any:
    """The type of the RRefs of `helpers_named`."""
    return _annotations.try_ann_to_type(helpers.ScriptRRef, None)


def _annotation_of(annotation_str: str) -> Any:
    found = torch.jit._state._get_python_class(annotation_str)  # type: ignore[no-untyped-call]
    if found is not None:
        return found
    try:
        return eval(annotation_str, {**vars(typing), "Tensor": torch.Tensor, "Device": torch.device})
    except (NameError, SyntaxError, AttributeError) as error:
        raise RuntimeError(
            f"a value of the type {annotation_str} cannot be behind an RRef that compiled code makes: annotate an "
            "argument with RRef of that type in a function that is compiled before"
        ) from error


def _make_helpers(annotation: Any, copied: bool) -> Any:
    names = {
        "Kept": torch.futures.Future[annotation] if copied else annotation,
        "Value": annotation,
        "IS_COPIED": copied,
        "end": script_links.end,
        "fetch": script_links.fetch,
        "kept_of": script_links.kept_of if copied else script_links.local_value,
        "refuse": script_links.refuse,
        "rref_of": script_links.rref_of,
        "take": script_links.take,
    }
    made = compile_source(_SOURCE.replace("GET", ".wait()" if copied else ""), names)
    state: Any = torch.jit._state
    state._name_to_pyclass[f"__torch__.{made.__name__}.ScriptRRef"] = script_links.ReturnedRRef  # what Python gets
    return made


def compile_source(source: str, names: Mapping[str, Any]) -> Any:
    """A module of that source: TorchScript compiles source, and finds it by the module's name.

    Args:
        source: of the module.
        names: what it uses, beside torch, Tensor, Future and Any.
    """
    name = f"zrpc.compat.generated_{next(_numbers)}"
    filename = f"<{name}>"
    module = types.ModuleType(name)
    module.__file__ = filename
    usual = {"Any": Any, "Future": torch.futures.Future, "Tensor": torch.Tensor, "torch": torch}
    vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})
    vars(module).update(usual)
    sys.modules[name] = module
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec", dont_inherit=True), vars(module))
    return module
