"""Lets TorchScript programs call a RemoteModule.

TorchScript knows neither RRefs nor remote calls that are made in Python. What it has is `torch.jit.ignore`: compiled
code may call back into a Python function of declared types. So `forward` and `forward_async` are generated for each
interface, as source because TorchScript compiles source, around two such functions: one starts the remote call, the
other waits for its result. Two things are handed from one to the other through compiled code, which can hold a tensor
but no Python object: what starts a call (the *link*) and the call. Each rides as the attribute of an empty tensor: a
tensor keeps its Python object, attributes and all, for as long as compiled code holds the tensor, so nothing has to
be looked up in a table or freed by hand.

The future of `forward_async` is a `torch.jit.fork` that waits: a plain Python future would give compiled code an
object where it expects a value of the declared type. The remote call itself has started by then, on the calling
thread, whose autograd context it belongs to.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Start = Callable[[tuple[Any, ...], dict[str, Any]], torch.futures.Future[Any]]

LINK_ATTRIBUTE = "_link"

_TEMPLATE = """
@torch.jit.ignore
def _start(link: Tensor, {typed}) -> Tensor:
    return start(link, ({names}))


@torch.jit.ignore
def _finish(call: Tensor) -> Result:
    return finish(call)


def _finished(call: Tensor) -> Result:
    return _finish(call)


@torch.jit.export
def forward_async(self, {typed}) -> Future[Result]:
    if torch.jit.is_scripting():
        return torch.jit.fork(_finished, _start(self.{link}, {names}))
    else:
        return future(_start(self.{link}, {names}))


@torch.jit.export
def forward(self, {typed}) -> Result:
    return _finish(_start(self.{link}, {names}))
"""

_numbers = itertools.count()


@functools.cache
def methods_of(interface: Any) -> list[Callable[..., Any]]:
    """`forward_async` and `forward` with the types of `interface.forward`, for a RemoteModule to have compiled.

    Args:
        interface: a class decorated with `torch.jit.interface` that has a method `forward`.

    Raises:
        ValueError: it is not, or has not.
    """
    if not getattr(interface, "__torch_script_interface__", False) or not hasattr(interface, "forward"):
        raise ValueError(
            f"module_interface_cls {interface} must be a type object decorated by @torch.jit.interface, "
            "with a method `forward`"
        )
    signature = inspect.signature(interface.forward, eval_str=True)
    parameters = list(signature.parameters.values())[1:]
    types = {f"T{index}": _type_of(parameter.annotation) for index, parameter in enumerate(parameters)}
    typed = ", ".join(_typed(parameter, name) for parameter, name in zip(parameters, types, strict=True))
    source = _TEMPLATE.format(
        typed=typed, names="".join(f"{parameter.name}, " for parameter in parameters), link=LINK_ATTRIBUTE
    )
    namespace: dict[str, Any] = {
        **types,
        "Result": _type_of(signature.return_annotation),
        "Tensor": torch.Tensor,
        "Future": torch.jit.Future,
        "torch": torch,
        "start": _start,
        "finish": _finish,
        "future": _future,
        "__name__": f"zrpc.nn.generated_{next(_numbers)}",
    }
    filename = f"<{namespace['__name__']}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec", dont_inherit=True), namespace)
    return [namespace["forward_async"], namespace["forward"]]


def _type_of(annotation: Any) -> Any:
    """TorchScript's rule: what is not annotated is a tensor."""
    return torch.Tensor if annotation is inspect.Signature.empty else annotation


def _typed(parameter: inspect.Parameter, type_name: str) -> str:
    default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
    return f"{parameter.name}: {type_name}{default}"


def make_link(start: Start) -> torch.Tensor:
    """An empty tensor that carries `start(args, kwargs)`, which begins a remote call."""
    return _carry(start)


def is_linked(module: torch.nn.Module) -> bool:
    """Whether `module` is a compiled RemoteModule."""
    return hasattr(module, LINK_ATTRIBUTE) and hasattr(getattr(module, LINK_ATTRIBUTE), "carried")


def _carry(cargo: object) -> torch.Tensor:
    carrier = torch.empty(0)
    carrier.__dict__["carried"] = cargo
    return carrier


def _start(link: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
    start: Start = link.__dict__["carried"]
    return _carry(start(args, {}))


def _future(call: torch.Tensor) -> torch.futures.Future[Any]:
    future: torch.futures.Future[Any] = call.__dict__["carried"]
    return future


def _finish(call: torch.Tensor) -> Any:
    return _future(call).wait()
