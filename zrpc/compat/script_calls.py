"""RPC calls made inside compiled TorchScript code.

What. TorchScript's compiler turns `rpc.rpc_sync`, `rpc_async` and `remote` into nodes of its own, which run torch's C++
agent. It checks the arguments and finds out the type of the result; that is kept. Afterwards, before the function first
runs, each such node is replaced by calls of Python functions, which make the call with zrpc.

How. `rpc_async` becomes a Python function that begins the call and returns a future, and a fork that waits for it and
takes the result out. The fork is suspended while it waits and keeps no thread. `rpc_sync` is the same without a fork.
`remote` becomes an instance of the class that stands for RRefs (`zrpc.compat.scripting`), and methods of RRefs, where
the compiler thought of torch's own, become that class's.

Threads. See `zrpc.compat.script_threads`. A handler thread counts as waiting for as long as a call is under way that
compiled code made that began on it: when it really waits is not seen.

Not reached: methods of TorchScript classes, and code loaded from a file by `torch.jit.load`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import torch

from zrpc import autograd
from zrpc.api import begin, remote
from zrpc.compat import script_links, scripting
from zrpc.compat.script_threads import Entered, may_block, snapshot
from zrpc.ids import WorkerInfo
from zrpc.profiling import ExecMode
from zrpc.wire.compilations import compilations
from zrpc.wire.scripting import find_function

_SYNC, _ASYNC, _REMOTE = "prim::rpc_sync", "prim::rpc_async", "prim::rpc_remote"
_CALLS = (_SYNC, _ASYNC, _REMOTE)
_RREF_METHODS = ("to_here", "local_value", "owner", "owner_name", "is_owner", "confirmed_by_owner")
_UNSET = -1.0

_calling: set[str] = set()
"""Names of compiled functions that make calls, themselves or through others."""


def install() -> None:
    """From now on calls in code that is compiled are zrpc's."""
    recursive: Any = torch.jit._recursive
    native: Any = torch._C
    compile_function, make_module = native._jit_script_compile, recursive.create_script_module_impl

    def compile_and_replace(name: str, *args: Any) -> Any:
        with compilations.under_way(name):  # nor may it run before the calls in it are replaced
            function = compile_function(name, *args)
            replace_calls(function.name, function.graph)
        return function

    def make_and_replace(*args: Any) -> Any:
        module = make_module(*args)
        for name in module._c._method_names():
            replace_calls(name, module._c._get_method(name).graph)
        return module

    compiled = scripting.compile_source(_AUTOGRAD_SOURCE, {"autograd": autograd})
    state: Any = torch.jit._state
    state._set_jit_function_cache(autograd.get_gradients, compiled.get_gradients)  # called by compiled code
    state._set_jit_function_cache(autograd.backward, compiled.dist_backward)
    native._jit_script_compile = compile_and_replace
    recursive.create_script_module_impl = make_and_replace


def replace_calls(name: str, graph: Any) -> None:
    """Replace the calls that `graph`, of the function `name`, makes."""
    calls = [node for kind in _CALLS for node in graph.findAllNodes(kind, True)]
    forks = [node for node in graph.findAllNodes("prim::fork", True) if _makes_calls(node.g("Subgraph"))]
    for rref in list(graph.inputs()):
        _end_use(graph, rref)
    for node in forks:
        with graph.insert_point_guard(node):
            graph.insertGraph(_compiled("carry").graph, [])
    if calls or forks or _makes_calls(graph):
        _calling.add(name)
    methods = [(method, node) for method in _RREF_METHODS for node in graph.findAllNodes(f"aten::{method}", True)]
    has_rrefs = bool(methods) or any(node.kind() == _REMOTE for node in calls)
    for node in calls:
        _replace_call(graph, node)
    if has_rrefs:
        _replace_types(graph)
    for method, node in methods:
        _replace_method(graph, node, method)


def _end_use(graph: Any, rref: Any) -> None:
    """See to it that, if `rref` is an RRef, what was changed in its value is known when the function ends."""
    helpers = scripting.helpers_of(rref.type())
    if helpers is None or not helpers.IS_COPIED:
        return
    with graph.insert_point_guard(graph.return_node()):
        graph.insertGraph(helpers.end_of_use.graph, [rref])


def _makes_calls(graph: Any) -> bool:
    """Whether it uses a function that makes calls."""
    constants = graph.findAllNodes("prim::Constant", True)
    return any(node.hasAttribute("name") and node.s("name") in _calling for node in constants)


def _replace_call(graph: Any, node: Any) -> None:
    inputs = list(node.inputs())
    with graph.insert_point_guard(node):
        if len(inputs) == 2:
            inputs.append(graph.insertConstant(()))
        if len(inputs) == 3:
            inputs.append(graph.insertConstant(None))
        if len(inputs) == 4:
            inputs.append(graph.insertConstant(_UNSET))
        made = _MAKERS[node.kind()](graph, inputs, node.output().type())
    node.output().replaceAllUsesWith(made)
    node.destroy()


def _insert_sync(graph: Any, inputs: list[Any], result_type: Any) -> Any:
    (made,) = graph.insertGraph(_compiled("sync").graph, inputs)
    made.setType(result_type)  # what the Python function returns is converted to it
    return made


def _insert_async(graph: Any, inputs: list[Any], future_type: Any) -> Any:
    (begun,) = graph.insertGraph(_compiled("start").graph, inputs)
    body = torch._C.Graph()
    waited = body.addInput()
    waited.setType(begun.type())
    (taken,) = body.insertGraph(_compiled("finish").graph, [waited])
    taken.setType(future_type.getElementType())
    body.registerOutput(taken)
    fork = graph.insertNode(graph.create("prim::fork", [begun], 1))
    fork.g_("Subgraph", body)
    fork.output().setType(future_type)
    return fork.output()


def _insert_remote(graph: Any, inputs: list[Any], rref_type: Any) -> Any:
    (link,) = graph.insertGraph(_compiled("create").graph, inputs)
    (made,) = graph.insertGraph(_helpers_for(rref_type).from_link.graph, [link])
    return made


_MAKERS = {_SYNC: _insert_sync, _ASYNC: _insert_async, _REMOTE: _insert_remote}


def _replace_method(graph: Any, node: Any, method: str) -> None:
    """A method of an RRef that the compiler takes for one of torch's."""
    helpers = scripting.helpers_of(node.inputsAt(0).type())
    with graph.insert_point_guard(node):
        (made,) = graph.insertGraph(getattr(helpers, method).graph, list(node.inputs()))
    node.output().replaceAllUsesWith(made)
    node.destroy()


def _replace_types(block: Any) -> None:
    """Give values that are RRefs of torch's to the compiler, or hold such, the types of what they are here."""
    for node in block.nodes():
        for value in node.outputs():
            _replace_type(value)
        for inner in node.blocks():
            for value in inner.inputs():
                _replace_type(value)
            _replace_types(inner)


def _replace_type(value: Any) -> None:
    if "RRef[" in value.type().annotation_str:
        value.setType(_type_here(value.type()))


def _type_here(of: Any) -> Any:
    kind = of.kind()
    if kind == "RRefType":
        return scripting.type_of(_helpers_for(of))
    if kind == "ListType":
        return torch._C.ListType(_type_here(of.getElementType()))
    if kind == "OptionalType":
        return torch._C.OptionalType(_type_here(of.getElementType()))
    if kind == "DictType":
        return torch._C.DictType(of.getKeyType(), _type_here(of.getValueType()))
    if kind == "TupleType":
        return torch._C.TupleType([_type_here(part) for part in of.elements()])
    return of


def _helpers_for(rref_type: Any) -> Any:
    """The compiled functions on RRefs of a type of torch's."""
    return scripting.helpers_named(rref_type.annotation_str.removeprefix("RRef[").removesuffix("]"))


# ---- what compiled code calls --------------------------------------------------------------------------------------


def _callee(to: Any) -> str | WorkerInfo:
    return to if isinstance(to, str | WorkerInfo) else str(to)


def carry() -> int:
    """Leave this thread's snapshot where a fork finds it."""
    snapshot()
    return 0


def start(to: Any, name: str, args: Any, kwargs: Any, timeout: float) -> Any:
    """Begin a call; a future of its own future, once that is done: errors are taken out by `take`."""
    waiting = snapshot().waiting
    with Entered():
        future = begin(ExecMode.ASYNC_JIT, _callee(to), find_function(name), args, kwargs or {}, timeout)
    waiting.__enter__()  # when compiled code waits is not seen: it may from now on

    def is_over(_: object) -> None:
        waiting.__exit__(None, None, None)

    future.add_done_callback(is_over)
    return script_links.handed_on(future)


def sync(to: Any, name: str, args: Any, kwargs: Any, timeout: float) -> Any:
    """As `start`. On a thread that may block the call is over when this returns, which is quicker."""
    if not may_block():
        return start(to, name, args, kwargs, timeout)
    future = begin(ExecMode.ASYNC_JIT, _callee(to), find_function(name), args, kwargs or {}, timeout)
    with suppress(Exception):  # it is raised when the result is taken
        future.wait()
    return script_links.handed_on(future)


def create(to: Any, name: str, args: Any, kwargs: Any, timeout: float) -> torch.Tensor:
    """Make a call whose result stays on the callee; what stands for the RRef in compiled code."""
    with Entered():
        made: Any = remote(_callee(to), find_function(name), args, kwargs or {}, timeout)
    return script_links.link_of(made)


@cache
def _compiled(name: str) -> Any:
    """A compiled function that calls the Python function of that name, or waits and then does."""
    return getattr(scripting.compile_source(_SOURCE, globals()), f"call_{name}")


_PARAMETERS = "to: Any, name: str, args: Any, kwargs: Any, timeout: float"
_ARGUMENTS = "to, name, args, kwargs, timeout"
_SOURCE = f"""
@torch.jit.ignore
def rpc_carry() -> int:
    return carry()


@torch.jit.ignore
def rpc_sync({_PARAMETERS}) -> Future[Any]:
    return sync({_ARGUMENTS})


@torch.jit.ignore
def rpc_async({_PARAMETERS}) -> Future[Any]:
    return start({_ARGUMENTS})


@torch.jit.ignore
def rpc_result(done: Any) -> Any:
    return script_links.take(done)


@torch.jit.ignore
def rpc_remote({_PARAMETERS}) -> Tensor:
    return create({_ARGUMENTS})


@torch.jit.script
def call_carry() -> int:
    return rpc_carry()


@torch.jit.script
def call_sync({_PARAMETERS}) -> Any:
    return rpc_result(rpc_sync({_ARGUMENTS}).wait())


@torch.jit.script
def call_start({_PARAMETERS}) -> Future[Any]:
    return rpc_async({_ARGUMENTS})


@torch.jit.script
def call_finish(done: Future[Any]) -> Any:
    return rpc_result(done.wait())


@torch.jit.script
def call_create({_PARAMETERS}) -> Tensor:
    return rpc_remote({_ARGUMENTS})
"""
_AUTOGRAD_SOURCE = """
@torch.jit.ignore
def _get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    return autograd.get_gradients(context_id)


@torch.jit.ignore
def _backward(context_id: int, roots: list[Tensor], retain_graph: bool, mode: str) -> None:
    autograd.backward(context_id, roots, retain_graph, mode)


@torch.jit.script
def get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    return _get_gradients(context_id)


@torch.jit.script
def dist_backward(context_id: int, roots: list[Tensor], retain_graph: bool = False, mode: str = "fast") -> None:
    _backward(context_id, roots, retain_graph, mode)
"""
