"""Names of torch.distributed.rpc that programs take, and that zrpc itself does not use."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

import zrpc.api
from zrpc.agent.current import current_agent
from zrpc.agent.future import Future
from zrpc.compat.rpc.constants import UNSET_RPC_TIMEOUT
from zrpc.profiling import ExecMode, profiling_key
from zrpc.rref.rref import RRef

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zrpc.ids import WorkerInfo

T = TypeVar("T")
GenericWithOneTypeVar: Any = Generic[T]  # type: ignore[index]  # torch's name for it


class AllGatherStates:
    """What a gathering that a program builds of its own has gathered so far.

    Attributes:
        gathered_objects: each worker's object, by the worker's name.
        proceed_signal: to be set once all are there.
    """

    def __init__(self) -> None:
        self.gathered_objects: dict[str, Any] = {}
        self.proceed_signal = threading.Event()


class RemoteProfilerManager:
    """Accepted for programs that name their calls themselves. Here each call's events carry the call's own name."""

    @staticmethod
    def set_current_profiling_key(key: str) -> None:
        """Of no effect."""
        del key


def method_factory(method_name: str, docstring: str) -> Callable[..., Any]:
    """A function that calls the method `method_name` of an RRef, documented by `docstring`."""
    function = getattr(RRef, method_name)

    def method(self: RRef[Any], *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__doc__ = docstring
    return method


method_name = "to_here"
docstring = str(RRef.to_here.__doc__)
method = RRef.to_here
new_method = method_factory(method_name, docstring)
"""torch's modules have these four left over from a loop, and export the last."""


def _set_profiler_node_id(node_id: int) -> None:
    """Of no effect: profiles know this worker's rank."""
    del node_id


def _cleanup_python_rpc_handler() -> None:
    """Of no effect: zrpc keeps no Python functions for C++."""


def _rref_typeof_on_owner(rref: RRef[Any], blocking: bool = True) -> Any:
    """The type of the value of `rref`, on its owner; unless `blocking`, as a future."""
    known = type(rref.local_value())
    if blocking:
        return known
    done: Future[type] = Future()
    done.set_result(known)
    return done


def _rref_typeof_on_user(rref: RRef[Any], timeout: float = UNSET_RPC_TIMEOUT, blocking: bool = True) -> Any:
    """The type of the value of `rref`, which another worker owns; unless `blocking`, as a future."""
    return rref._get_type(timeout=timeout, blocking=blocking)


def _invoke_rpc(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    rpc_type: ExecMode,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    rpc_timeout: float = UNSET_RPC_TIMEOUT,
) -> Future[Any]:
    """Begin a call; profiles name it as asynchronous."""
    del rpc_type
    return zrpc.api.rpc_async(to, func, args, kwargs, rpc_timeout)


def _get_should_profile() -> bool:
    """Whether the legacy profiler runs on this thread."""
    autograd: Any = torch._C._autograd
    legacy = torch._C._profiler.ActiveProfilerType.LEGACY
    return bool(autograd._profiler_enabled() and autograd._profiler_type() == legacy)


def _enable_rpc_profiler(
    should_profile: bool, qualified_name: str | None, func: Callable[..., Any], rpc_type: ExecMode, dst: WorkerInfo
) -> AbstractContextManager[Any]:
    """What a program enters around a call of its own making, to have it in the profile by that name."""
    if not should_profile:
        return nullcontext()
    name = qualified_name or zrpc.api.function_name(func)
    key = profiling_key(rpc_type, name, current_agent().info.name, dst.name)
    recorded: AbstractContextManager[Any] = torch.autograd.profiler.record_function(key)
    return recorded
