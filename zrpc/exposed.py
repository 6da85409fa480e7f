"""What other workers may call here where `RpcBackendOptions(allow="registered")` holds: `expose` and its registry.

What: the registry has functions and classes by the module and the qualified name that they were exposed under. A call
names an entry of it, and nothing is imported or looked up anywhere else. A class stands for its constructor, for its
static methods and class methods, and for the public methods that it defines itself: these are called on objects behind
RRefs. What a base class defines counts if the base class, or the method, is exposed.

Invariants: an entry is an object that this process made and marked. Names say which one, and never make one.

Threads: any. Entries are added, mostly as modules are imported, and never taken out; each is one operation on a dict.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeVar

from zrpc.errors import ConfigError

T = TypeVar("T")
Name = tuple[str, str]
"""A module and a qualified name."""

CALL = "__call__"
"""The one method with such a name that is called through RRefs, where an exposed class defines it."""

_MARK = "_zrpc_exposed"


class Registry:
    """What is exposed. Any thread may call it."""

    def __init__(self) -> None:
        self._entries: dict[Name, Any] = {}
        self._names: dict[Any, Name] = {}
        self._classes: set[type] = set()
        self._operators: set[str] = set()

    def add(self, target: Any) -> None:
        """See `expose`."""
        operator = getattr(target, "_qualified_op_name", None)  # of a torch operator, all overloads
        if isinstance(operator, str):
            self._operators.add(operator)
            return
        module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
        if not callable(target) or not isinstance(module, str) or not isinstance(name, str):
            raise ConfigError(
                f"{target!r} cannot be exposed: it has no name to be called by. Put @expose on a function or a class; "
                "inside of @staticmethod and @classmethod"
            )
        if isinstance(target, type):
            self._classes.add(target)
            for attribute, value in vars(target).items():
                if isinstance(value, staticmethod | classmethod) and not attribute.startswith("_"):
                    self._enter((module, f"{name}.{attribute}"), getattr(target, attribute))
        elif isinstance(target, FunctionType):
            vars(target)[_MARK] = True
            scope = name.rpartition(".")[0]
            if scope and not scope.endswith("<locals>"):  # a method: it is called on objects only
                return
        self._enter((module, name), target)

    def _enter(self, name: Name, entry: Any) -> None:
        self._entries[name] = entry
        self._names[entry] = name

    def name_of(self, target: Any) -> Name | None:
        """The name under which `target` is exposed; None: it is not."""
        try:
            return self._names.get(target)
        except TypeError:  # it has no hash
            return None

    def find(self, module: Any, name: Any) -> Any | None:
        """What is exposed under that name; None: nothing is."""
        return self._entries.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None

    def has_operator(self, name: str) -> bool:
        """Whether the torch operator of that name, such as `mylib::op`, is exposed."""
        return name in self._operators

    def is_class(self, cls: type) -> bool:
        """Whether `cls` itself is exposed."""
        return cls in self._classes

    def is_method(self, cls: type, name: str) -> bool:
        """Whether the method `name` of objects of class `cls` is exposed."""
        if not isinstance(name, str) or (name.startswith("_") and name != CALL):
            return False
        for base in cls.__mro__:
            if name in vars(base):
                found = vars(base)[name]
                if not isinstance(found, FunctionType | staticmethod | classmethod):
                    return False
                function = found if isinstance(found, FunctionType) else found.__func__
                return base in self._classes or getattr(function, _MARK, False) is True
        return False


registry = Registry()


def expose(target: T) -> T:
    """Let other workers call `target` where `RpcBackendOptions(allow="registered")` holds. To be used as a decorator.

    A function may be called by `rpc_sync`, `rpc_async` and `remote`. Of a class, the constructor may be called
    (`remote(to, Class)`), and through RRefs to its objects the public methods that it defines:
    `rref.rpc_sync().method()`. Methods that it inherits need the mark themselves, or on the class that defines them. In
    a class that is not exposed the mark exposes a single method, for calls through RRefs. An operator of
    `torch.library` may be exposed too (`expose(torch.ops.mylib.op)`); those of torch itself need no mark.

    All workers that call or run `target` must have run this, under the same name: the module and the qualified name of
    `target`. Elsewhere, with `allow="any"` or a list of modules, the mark says nothing.

    Returns:
        `target` itself.

    Raises:
        ConfigError: `target` has no name to be called by.
    """
    registry.add(target)
    return target
