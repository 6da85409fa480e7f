"""The rule of `RpcBackendOptions(allow=[...])`: streams and calls name what listed modules define, and little else.

What: `ListedRules` resolves names. A listed module stands for itself and its submodules, and for what is *defined*
there: what a module imports from elsewhere has another home, which must be listed too. Beside that there is the table
of `zrpc.wire.allowed_names`.

Pickle calls more than what it is told by name, so streams are read by its implementation in Python: the one in C lets a
stream change what it has named (a function, a class) as if it had made it, and takes names out of `copyreg`'s cache
without asking. It takes longer on streams of many small objects; tensors, arrays and large buffers are
beside the stream and are not affected.

Bound methods and members of enumerations travel as `getattr(object, name)`. In place of that function stands one that
gives these alone, of objects of listed modules. In the same way methods are called on the values of RRefs.

Threads: any; nothing changes after construction. Failure: `NotAllowedError`.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
import sys
from enum import Enum
from functools import cache
from types import (
    ClassMethodDescriptorType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from zrpc.errors import NotAllowedError
from zrpc.wire.allowed_names import ALLOWED_NAMES, FILE_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.wire.envelope import Buffer

_Pickle: Any = pickle
_Base: Any = _Pickle._Unpickler  # the implementation in Python

_PLAIN_VALUES = (torch.Tensor, torch.nn.Parameter, bool, bytes, complex, dict, float, frozenset, int, list, set, tuple)
"""Classes of values of RRefs whose methods, but private ones, may be called: none opens a file, or runs what it has."""
_METHODS = (
    FunctionType, staticmethod, classmethod, MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType,
    type(cache(int)),
)  # fmt: skip
_SPECIAL = frozenset({"__call__", "__contains__", "__delitem__", "__getitem__", "__len__", "__setitem__"})
"""Methods with such names that may be called all the same."""


class ListedRules:
    """See `zrpc.wire.loading.Rules`.

    Args:
        worker: the name of this worker, for errors.
        modules: what is listed.
    """

    def __init__(self, worker: str, modules: Sequence[str]) -> None:
        self._worker = worker
        self._modules = tuple(modules)
        self._in_place_of: dict[tuple[str, str], Callable[..., Any]] = {
            ("builtins", "getattr"): self._attribute,
            ("builtins", "type"): self._type,
        }

    # ---- names -----------------------------------------------------------------------------------------------------

    def loads(self, stream: Buffer) -> Any:
        """See `loading.loads`."""
        return _Unpickler(io.BytesIO(stream), self).load()

    def load_from(self, file: Any) -> Any:
        """See `loading.load_from`."""
        return _Unpickler(_OfBytes(file), self).load()

    def find(self, module: str, name: str) -> Any:
        """See `loading.find`."""
        if (module, name) in ALLOWED_NAMES:
            return _follow(module, name)
        if (instead := self._in_place_of.get((module, name))) is not None:
            return instead
        self.check(module, name)
        found: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
            if isinstance(found, ModuleType):
                self._refuse(found.__name__, name)
        home = _home(found)
        if home != module:
            self.check(home, getattr(found, "__qualname__", name))
        return found

    def check(self, module: str, name: str) -> None:
        """See `loading.check`."""
        if not self._is_listed(module):
            self._refuse(module, name)

    def check_module(self, module: Any) -> None:
        """See `loading.check_module`."""
        self.method(module, "__call__")

    def check_operator(self, namespace: str, name: str) -> None:
        """See `loading.check_operator`: those of torch's own that open no files, and of listed namespaces."""
        if namespace != "aten" or name in FILE_OPERATORS:
            self.check(f"torch.ops.{namespace}", name)

    # ---- attributes ------------------------------------------------------------------------------------------------

    def method(self, value: Any, name: str) -> Any:
        """See `loading.method`: methods of plain values, and of objects of classes of listed modules."""
        cls = type(value)
        is_public = isinstance(name, str) and (not name.startswith("_") or name in _SPECIAL)
        if not is_public or not (cls in _PLAIN_VALUES or self._is_listed(_home(cls))):
            self._refuse(_home(cls), f"{cls.__qualname__}.{name}")
        static = inspect.getattr_static(cls, name, None)
        if static is None and not hasattr(value, name):
            raise AttributeError(f"{cls.__qualname__!r} object has no attribute {name!r}")
        if not isinstance(static, _METHODS):  # what objects hold, and what properties compute, is anything
            self._refuse(_home(cls), f"{cls.__qualname__}.{name}")
        return getattr(value, name)

    def type_of(self, value: Any) -> Any:
        """See `loading.type_of`."""
        return type(value)

    def _attribute(self, obj: Any, name: str) -> Any:
        """What stands for `getattr` in streams."""
        cls = obj if isinstance(obj, type) else type(obj)
        if not isinstance(name, str) or name.startswith("_") or not self._is_listed(_home(cls)) or "." in name:
            self._refuse("builtins", "getattr")
        found = getattr(obj, name)
        is_member = isinstance(obj, type) and issubclass(obj, Enum) and isinstance(found, obj)
        if is_member or (isinstance(found, MethodType) and self._is_listed(_home(found.__func__))):
            return found
        self._refuse("builtins", "getattr")

    def _type(self, constant: Any, *more: Any) -> Any:
        """What stands for `type` in streams: the classes of constants have no name that pickle knows."""
        if more or not any(constant is one for one in (None, Ellipsis, NotImplemented)):
            self._refuse("builtins", "type")
        return type(constant)

    # ---- below -----------------------------------------------------------------------------------------------------

    def _is_listed(self, module: object) -> bool:
        return isinstance(module, str) and any(
            module == listed or module.startswith(f"{listed}.") for listed in self._modules
        )

    def _refuse(self, module: object, name: object) -> NoReturn:
        raise self.refusal(f"{module}.{name}", module)

    def refusal(self, what: str, module: object) -> NotAllowedError:
        """The error that says that `what`, of `module`, is refused."""
        return NotAllowedError(
            f"{self._worker} refuses {what}: the option allow={list(self._modules)!r} of {self._worker} does not "
            f"cover it, and nothing of it was run. If calls and values may use that module there, add {module!r} to "
            "RpcBackendOptions(allow=[...]) of that worker, or to ZRPC_ALLOW"
        )


class _Unpickler(_Base):  # type: ignore[misc]
    """Pickle's, with a rule for names."""

    def __init__(self, file: Any, rules: ListedRules) -> None:
        super().__init__(file)
        self._rules = rules
        self._named: dict[int, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = self._rules.find(module, name)
        self._named[id(found)] = found
        return found

    def get_extension(self, code: int) -> None:
        raise self._rules.refusal(f"the extension {code} of copyreg", "copyreg")

    def load_build(self) -> None:
        if id(self.stack[-2]) in self._named:
            raise self._rules.refusal(f"a change of {self.stack[-2]!r}", _home(self.stack[-2]))
        super().load_build()

    dispatch = {**_Base.dispatch, pickle.BUILD[0]: load_build}  # noqa: RUF012  # as in pickle


class _OfBytes:
    """A file of which pickle's implementation in Python gets `bytes`, as it wants."""

    def __init__(self, file: Any) -> None:
        self.readinto = file.readinto
        self.readline = file.readline
        self._file = file

    def read(self, nbytes: int) -> bytes:
        return bytes(self._file.read(nbytes))


def _follow(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _home(found: Any) -> str:
    """The module that defines `found`: its own, or its class's."""
    home = getattr(found, "__module__", None)
    return home if isinstance(home, str) else type(found).__module__
