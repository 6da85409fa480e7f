"""torch.distributed.rpc.api: calls, gatherings and shutdown.

Programs replace some of these functions, so each of them looks the others up here when it runs.
"""

from __future__ import annotations

import functools
import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

import zrpc.api
from zrpc import ending, gather, lifecycle
from zrpc.agent.current import current_agent, is_agent_set
from zrpc.api import get_worker_info, remote, rpc_sync
from zrpc.compat import agent, invocation
from zrpc.compat.missing import explaining
from zrpc.compat.rpc.constants import DEFAULT_SHUTDOWN_TIMEOUT, UNSET_RPC_TIMEOUT
from zrpc.compat.rpc.internal import PythonUDF, _internal_rpc_pickler
from zrpc.compat.rpc.internal import RPCExecMode as RPCExecMode
from zrpc.compat.rpc.internal import _build_rpc_profiling_key as _build_rpc_profiling_key
from zrpc.compat.rpc.stand_ins import AllGatherStates as AllGatherStates
from zrpc.compat.rpc.stand_ins import GenericWithOneTypeVar as GenericWithOneTypeVar
from zrpc.compat.rpc.stand_ins import RemoteProfilerManager as RemoteProfilerManager
from zrpc.compat.rpc.stand_ins import _cleanup_python_rpc_handler as _cleanup_python_rpc_handler
from zrpc.compat.rpc.stand_ins import _enable_rpc_profiler as _enable_rpc_profiler
from zrpc.compat.rpc.stand_ins import _get_should_profile as _get_should_profile
from zrpc.compat.rpc.stand_ins import _invoke_rpc as _invoke_rpc
from zrpc.compat.rpc.stand_ins import _rref_typeof_on_owner as _rref_typeof_on_owner
from zrpc.compat.rpc.stand_ins import _rref_typeof_on_user as _rref_typeof_on_user
from zrpc.compat.rpc.stand_ins import docstring as docstring
from zrpc.compat.rpc.stand_ins import method as method
from zrpc.compat.rpc.stand_ins import method_factory as method_factory
from zrpc.compat.rpc.stand_ins import method_name as method_name
from zrpc.compat.rpc.stand_ins import new_method as new_method
from zrpc.exposed import expose
from zrpc.ids import WorkerInfo
from zrpc.rref.context import RRefContext
from zrpc.rref.rref import RRef
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from zrpc.agent.future import Future
    from zrpc.compat.agent import TensorPipeAgent
    from zrpc.gathering import Key

__all__ = [
    "AllGatherStates",
    "RRef",
    "get_worker_info",
    "method_factory",
    "new_method",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_P: Any = P
_R: Any = T
PyRRef = RRef

DELETE_TIMEOUT_S = 100.0
"""torch's limit for the same."""

_ignore_rref_leak = True
"""Programs set this to False to have `shutdown` raise when others still use values of this worker."""
_default_pickler: Any = _internal_rpc_pickler
_thread_local_var = threading.local()

_get_current_rpc_agent = agent.get_current_rpc_agent
_is_current_rpc_agent_set = is_agent_set
_set_and_start_rpc_agent = agent.set_and_start_rpc_agent
_reset_current_rpc_agent = agent.reset_current_rpc_agent
_invoke_rpc_builtin = invocation.invoke_rpc_builtin
_invoke_rpc_python_udf = invocation.invoke_rpc_python_udf
_invoke_rpc_torchscript = invocation.invoke_rpc_torchscript
_invoke_remote_builtin = invocation.invoke_remote_builtin
_invoke_remote_python_udf = invocation.invoke_remote_python_udf
_invoke_remote_torchscript = invocation.invoke_remote_torchscript


_explain = explaining("torch.distributed.rpc.api")


def __getattr__(name: str) -> Any:
    if name == "_ALL_WORKER_NAMES":
        return {info.name for info in current_agent().members.all()} if is_agent_set() else set()
    return _explain(name)


def _require_initialized(func: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        current_agent()
        return func(*args, **kwargs)

    return wrapper


# ---- calls -----------------------------------------------------------------------------------------------------


def rpc_async(
    to: str | int | WorkerInfo,
    func: Callable[..., T],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Future[T]:
    """As `zrpc.rpc_async`; inside `_wait_all` its future is waited for there."""
    future = zrpc.api.rpc_async(to, func, args, kwargs, timeout)
    pending: list[Any] | None = getattr(_thread_local_var, "future_list", None)
    if pending is not None:
        pending.append(future)
    return future


def _to_worker_info(to: str | int | WorkerInfo) -> WorkerInfo:
    return to if isinstance(to, WorkerInfo) else current_agent().resolve(to)


@contextmanager
def _wait_all() -> Iterator[None]:
    """Wait, at the end of the body, for every `rpc_async` that this thread made in it; raises the first error."""
    _thread_local_var.future_list = []
    try:
        yield
    finally:
        try:
            torch.futures.wait_all(_thread_local_var.future_list)
        finally:
            del _thread_local_var.future_list


@contextmanager
def _use_rpc_pickler(rpc_pickler: Any) -> Iterator[None]:
    """In the body, all threads pickle their calls with `rpc_pickler`.

    It has a method `serialize` that gives a stream and a list of tensors, readable by `internal.deserialize`.
    """
    global _default_pickler

    def dumps(call: tuple[Any, ...]) -> Payload:
        data, tensors = rpc_pickler.serialize(PythonUDF(*call))
        return Payload(data, list(tensors))

    _default_pickler = rpc_pickler
    zrpc.api.set_call_pickler(dumps)
    try:
        yield
    finally:
        _default_pickler = _internal_rpc_pickler
        zrpc.api.set_call_pickler(None)


def _set_rpc_timeout(rpc_timeout: float) -> None:
    """Set the default time limit of this worker's calls; 0: none."""
    current_agent().set_rpc_timeout(rpc_timeout)


def get_rpc_timeout() -> float:
    """The default time limit of this worker's calls in seconds; 0: none."""
    return current_agent().rpc_timeout_s


def _init_rpc_states(made: Any) -> None:
    """Make the agent `made` by a backend this process's, unless the backend did that itself."""
    if not _is_current_rpc_agent_set():
        _set_and_start_rpc_agent(made)


# ---- gatherings ------------------------------------------------------------------------------------------------


class _Functions(gather.RemoteFunctions):
    """What gatherings call on others, by the names that programs may have replaced."""

    def contribution(self, key: Key, name: str, obj: Any) -> gather.RemoteCall:
        return _gather_to_leader, (key, name, obj)

    def conclusion(self, key: Key, objects: dict[str, Any]) -> gather.RemoteCall:
        return _broadcast_to_followers, (key, objects)


@expose
def _gather_to_leader(sequence_id: Key, worker_name: str, obj: Any, worker_names: object = None) -> None:
    del worker_names  # the sequence id says
    _gatherings().contribute(sequence_id, worker_name, obj)


@expose
def _broadcast_to_followers(sequence_id: Key, objects_map: dict[str, Any]) -> None:
    _gatherings().conclude(sequence_id, objects_map, None)


def _gatherings() -> gather.Gatherings:
    found: gather.Gatherings = current_agent().extensions[gather.Gatherings]
    return found


@_require_initialized
def _all_gather(
    obj: Any, worker_names: Iterable[str] | None = None, timeout: float = UNSET_RPC_TIMEOUT
) -> dict[str, Any]:
    """See `zrpc.gather.all_gather`."""
    _gatherings().call_by(_Functions())
    return gather.all_gather(obj, worker_names, None if timeout == UNSET_RPC_TIMEOUT else timeout)


@_require_initialized
def _barrier(worker_names: Iterable[str]) -> None:
    """Wait until all of `worker_names` are here; a failure is logged and not raised."""
    try:
        _all_gather(None, set(worker_names))
    except RuntimeError:
        logger.exception("a barrier was not completed")


# ---- shutdown --------------------------------------------------------------------------------------------------


@_require_initialized
def _wait_all_workers(timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """Wait until every worker of the group is here, but those that are lost; `timeout` 0: without limit.

    Raises:
        RuntimeError: as `zrpc.ending.wait_for_all`.
    """
    _gatherings().call_by(_Functions())
    try:
        ending.wait_for_all(timeout)
    except RuntimeError:
        logger.exception("not all workers came to the end")
        raise


def _delete_all_user_and_unforked_owner_rrefs(timeout: float = DELETE_TIMEOUT_S) -> None:
    """Give up this worker's references, and wait up to `timeout` seconds until the others gave up theirs."""
    ending.delete_rrefs(current_agent(), timeout)


def _destroy_rref_context(ignore_rref_leak: bool) -> dict[str, str]:
    """End this worker's references and values.

    Raises:
        RRefError: others still use values of this worker, and `ignore_rref_leak` is false.
    """
    _rref_context().destroy(ignore_rref_leak)
    return _rref_context_get_debug_info()


def _rref_context_get_debug_info() -> dict[str, str]:
    """Counts of this worker's references and values."""
    return _rref_context().debug_info()


def _rref_context() -> RRefContext:
    found: RRefContext = current_agent().extensions[RRefContext]
    return found


@_require_initialized
def shutdown(graceful: bool = True, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """As `zrpc.shutdown`, and others' leaks are reported as `_ignore_rref_leak` says."""
    if not graceful:
        _finalize_shutdown()
        return
    try:
        here: TensorPipeAgent = _get_current_rpc_agent()
        if here.is_static_group:
            lost = ending.workers_lost(_wait_all_workers, timeout)
            if lost is None:
                _delete_all_user_and_unforked_owner_rrefs()
            else:
                _delete_all_user_and_unforked_owner_rrefs(ending.LOSS_DRAIN_S)
        here.join(shutdown=True, timeout=timeout)
    finally:
        _finalize_shutdown()


def _finalize_shutdown() -> None:
    lifecycle.finalize(current_agent(), _ignore_rref_leak)
