"""RPC calls made inside compiled TorchScript code.

What. TorchScript's compiler turns `rpc.rpc_sync`, `rpc_async` and `remote` into nodes of its own, which run torch's C++
agent. It checks the arguments and finds out the type of the result; that is kept. Afterwards, before the function first
runs, each such node is replaced by calls of Python functions, which make the call with zrpc.

How. `rpc_async` becomes a Python function that begins the call and returns a future, and a fork that waits for it and
takes the result out. The fork is suspended while it waits and keeps no thread. `rpc_sync` becomes one Python function
that waits. `remote` becomes an instance of the class that stands for RRefs (`zrpc.compat.scripting`), and methods of
RRefs, where the compiler thought of torch's own, become that class's.

Threads. After a wait, compiled code goes on on a thread of TorchScript, which lacks what zrpc keeps by thread: the
autograd context and the profile. So the functions leave both where torch hands things on to such threads, before each
call and before each fork of code that makes calls.

Not reached: methods of TorchScript classes, and code loaded from a file by `torch.jit.load`.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch

from zrpc import autograd
from zrpc.agent.current import is_agent_set
from zrpc.api import begin, remote
from zrpc.autograd.wiring import current_service
from zrpc.compat import scripting
from zrpc.ids import WorkerInfo
from zrpc.profiling import ExecMode, session
from zrpc.rref.rref import RRef
from zrpc.wire.scripting import find_function

_SYNC, _ASYNC, _REMOTE = "prim::rpc_sync", "prim::rpc_async", "prim::rpc_remote"
_CALLS = (_SYNC, _ASYNC, _REMOTE)
_RREF_METHODS = ("to_here", "local_value", "owner", "owner_name", "is_owner", "confirmed_by_owner")
_KEY = "zrpc.thread"
_UNSET = -1.0

_calling: set[str] = set()
"""Names of compiled functions that make calls, themselves or through others."""


def install() -> None:
    """From now on calls in code that is compiled are zrpc's."""
    recursive: Any = torch.jit._recursive  # type: ignore[attr-defined]
    native: Any = torch._C
    compile_function, make_module = native._jit_script_compile, recursive.create_script_module_impl

    def compile_and_replace(*args: Any) -> Any:
        function = compile_function(*args)
        replace_calls(function.name, function.graph)
        return function

    def make_and_replace(*args: Any) -> Any:
        module = make_module(*args)
        for name in module._c._method_names():
            replace_calls(name, module._c._get_method(name).graph)
        return module

    compiled = scripting.compile_source(_AUTOGRAD_SOURCE, {"autograd": autograd})
    state: Any = torch.jit._state
    state._set_jit_function_cache(autograd.get_gradients, compiled.get_gradients)  # what compiled code that names it calls
    state._set_jit_function_cache(autograd.backward, compiled.dist_backward)
    native._jit_script_compile = compile_and_replace
    recursive.create_script_module_impl = make_and_replace


def replace_calls(name: str, graph: Any) -> None:
    """Replace the calls that `graph`, of the function `name`, makes."""
    calls = [node for kind in _CALLS for node in graph.findAllNodes(kind, True)]
    forks = [node for node in graph.findAllNodes("prim::fork", True) if _makes_calls(node.g("Subgraph"))]
    for node in forks:
        with graph.insert_point_guard(node):
            graph.insertGraph(_compiled("carry").graph, [])
    if calls or forks or _makes_calls(graph):
        _calling.add(name)
    for node in calls:
        _replace_call(graph, node)
    for method in _RREF_METHODS:
        for node in graph.findAllNodes(f"aten::{method}", True):
            _replace_method(graph, node, method)


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
    rref, *rest = node.inputs()
    if rref.type().kind() == "RRefType":
        helpers = _helpers_for(rref.type())
        rref.setType(scripting.type_of(helpers))
    else:  # the same RRef had its type set for another method, or it is that of a `remote` which was replaced
        helpers = scripting.helpers_of(rref.type())
    with graph.insert_point_guard(node):
        (made,) = graph.insertGraph(getattr(helpers, method).graph, [rref, *rest])
    node.output().replaceAllUsesWith(made)
    node.destroy()


def _helpers_for(rref_type: Any) -> Any:
    """The compiled functions on RRefs of a type of torch's."""
    return scripting.helpers_named(rref_type.annotation_str.removeprefix("RRef[").removesuffix("]"))


# ---- what compiled code calls --------------------------------------------------------------------------------------


class _Snapshot:
    """What a thread of zrpc's is in the midst of."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.session = session.current()
        self.context = current_service().contexts.find_current() if is_agent_set() else None


def _snapshot() -> _Snapshot:
    """That of the thread where the compiled code began."""
    if torch._C._is_key_in_tls(_KEY):
        left: _Snapshot = torch._C._get_obj_in_tls(_KEY)
        if left.thread != threading.get_ident():
            return left
    made = _Snapshot()
    torch._C._stash_obj_in_tls(_KEY, made)
    return made


class _Entered(ExitStack):
    """While it is entered this thread is in the midst of what the thread was in where the compiled code began."""

    def __init__(self) -> None:
        super().__init__()
        snapshot = _snapshot()
        if snapshot.thread == threading.get_ident() or not is_agent_set():
            return
        if snapshot.context is not None:
            self.enter_context(current_service().contexts.activate(snapshot.context))
        self.callback(session.set_current, session.current())
        session.set_current(snapshot.session)


def _callee(to: Any) -> str | WorkerInfo:
    return to if isinstance(to, str | WorkerInfo) else str(to)


def carry() -> int:
    """Leave this thread's part where a fork finds it."""
    _snapshot()
    return 0


def sync(to: Any, name: str, args: Any, kwargs: Any, timeout: float) -> Any:
    """Make a call and wait for its result."""
    with _Entered():
        return begin(ExecMode.ASYNC_JIT, _callee(to), find_function(name), args, kwargs or {}, timeout).wait()


def start(to: Any, name: str, args: Any, kwargs: Any, timeout: float) -> Any:
    """Begin a call; a future of its own future, once that is done: errors are taken out by `finish`."""
    with _Entered():
        future = begin(ExecMode.ASYNC_JIT, _callee(to), find_function(name), args, kwargs or {}, timeout)
    done: torch.futures.Future[Any] = torch.futures.Future()
    future.add_done_callback(done.set_result)
    return done


def take(done: Any) -> Any:
    """The result of a call that is done."""
    return done.value()


def create(to: Any, name: str, args: Any, kwargs: Any, timeout: float) -> torch.Tensor:
    """Make a call whose result stays on the callee; what stands for the RRef in compiled code."""
    with _Entered():
        made: RRef[Any] = remote(_callee(to), find_function(name), args, kwargs or {}, timeout)
    return scripting.link_of(made)


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
def rpc_sync({_PARAMETERS}) -> Any:
    return sync({_ARGUMENTS})


@torch.jit.ignore
def rpc_async({_PARAMETERS}) -> Future[Any]:
    return start({_ARGUMENTS})


@torch.jit.ignore
def rpc_result(done: Any) -> Any:
    return take(done)


@torch.jit.ignore
def rpc_remote({_PARAMETERS}) -> Tensor:
    return create({_ARGUMENTS})


@torch.jit.script
def call_carry() -> int:
    return rpc_carry()


@torch.jit.script
def call_sync({_PARAMETERS}) -> Any:
    return rpc_sync({_ARGUMENTS})


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
def _get_gradients(context_id: int) -> Dict[Tensor, Tensor]:
    return autograd.get_gradients(context_id)


@torch.jit.ignore
def _backward(context_id: int, roots: List[Tensor], retain_graph: bool, mode: str) -> None:
    autograd.backward(context_id, roots, retain_graph, mode)


@torch.jit.script
def get_gradients(context_id: int) -> Dict[Tensor, Tensor]:
    return _get_gradients(context_id)


@torch.jit.script
def dist_backward(context_id: int, roots: List[Tensor], retain_graph: bool = False, mode: str = "fast") -> None:
    _backward(context_id, roots, retain_graph, mode)
"""
