"""Results of TorchScript functions that stay TorchScript values.

What a compiled function returns becomes a Python value on its way out: lists, dicts and instances of TorchScript
classes are copied. Where the result is to be kept, for other compiled functions to change it in place, it must not come
out. So another function is made around it, out of graphs: it runs the first and returns a future that holds the result.
In Python the future gives a copy; compiled code that waits for it gets the value itself.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_jit: Any = torch.jit  # parts of it are untyped

_AS_IS = frozenset(
    ("BoolType", "ComplexType", "DeviceObjType", "FloatType", "FutureType", "IntType", "InterfaceType", "NoneType",
     "NumberType", "StringType", "TensorType")
)  # fmt: skip
"""Kinds of TorchScript types whose values have no parts that could be changed, or are the same object in Python."""


class ScriptValue:
    """A value that is a TorchScript object.

    Attributes:
        future: holds it, done; for compiled code.
    """

    __slots__ = ("future",)

    def __init__(self, future: Any) -> None:
        self.future = future

    def to_python(self) -> Any:
        """The value as Python sees it: lists, dicts and instances of TorchScript classes are copies."""
        return self.future.wait()


def is_copied(value_type: Any) -> bool:
    """Whether a value of that TorchScript type becomes a copy when Python gets it."""
    if value_type.kind() == "OptionalType":
        return is_copied(value_type.getElementType())
    return value_type.kind() not in _AS_IS


def call_and_keep(function: torch.jit.ScriptFunction[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a TorchScript function; a result that would come out as a copy stays inside, as a `ScriptValue`."""
    schema: Any = function.schema
    if not is_copied(schema.returns[0].type):
        return function(*args, **kwargs)
    arranged = _arranged(schema, args, kwargs)
    if arranged is None:
        return function(*args, **kwargs)  # raises, and says what fits
    return ScriptValue(_keeping(function.qualified_name, function)(*arranged))


def check_arguments(
    function: torch.jit.ScriptFunction[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """See whether a call gives a TorchScript function what it takes: how many arguments, and of which names.

    Raises:
        RuntimeError: it does not.
    """
    schema: Any = function.schema
    arguments = list(schema.arguments)
    names = {argument.name for argument in arguments}
    if len(args) > len(arguments):
        raise RuntimeError(
            f"{schema.name}() expected at most {len(arguments)} argument(s) but received {len(args)} argument(s). "
            f"Declaration: {schema}"
        )
    if unknown := set(kwargs) - names:
        raise RuntimeError(f"Unknown keyword argument '{min(unknown)}' for {schema.name}(). Declaration: {schema}")
    if _arranged(schema, args, kwargs) is None:
        raise RuntimeError(f"{schema.name}() misses arguments, or is given one twice. Declaration: {schema}")


def _arranged(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The arguments of a call in their order, defaults among them; None if they do not fit."""
    arguments = list(schema.arguments)
    given, named = list(args), dict(kwargs)
    for argument in arguments[len(given) :]:
        if argument.name in named:
            given.append(named.pop(argument.name))
        elif argument.has_default_value():
            given.append(argument.default_value)
        else:
            return None
    return None if named or len(given) != len(arguments) else given


_made: dict[str, tuple[Any, Callable[..., Any]]] = {}


def _keeping(name: str, function: Any) -> Callable[..., Any]:
    """A compiled function that runs `function` and returns its result in a future."""
    known = _made.get(name)
    if known is not None:
        return known[1]
    graph = torch._C.Graph()
    inputs = []
    for parameter in function.graph.inputs():
        made = graph.addInput()
        made.setType(parameter.type())
        inputs.append(made)
    (result,) = graph.insertGraph(function.graph, inputs)
    (held,) = graph.insertGraph(_holder().graph, [result])
    graph.registerOutput(held)
    keeping: Callable[..., Any] = torch._C._create_function_from_graph(function.name, graph)
    _made[name] = (function, keeping)
    return keeping


def _same(value: Any) -> Any:
    return value


def _hold(value: Any) -> torch.futures.Future[Any]:
    held: torch.futures.Future[Any] = _jit.fork(_same, value)
    return held


@cache
def _holder() -> Any:
    """A compiled function that puts a value of any type into a future. Made at first use: compiling takes time."""
    return _jit.script(_hold)
