"""torch.distributed.rpc.internal: the pickler of calls, and names for profiles."""

from __future__ import annotations

import pickle
import sys
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zrpc.agent.current import current_agent
from zrpc.compat import agent
from zrpc.compat.missing import explaining
from zrpc.profiling import ExecMode as RPCExecMode
from zrpc.profiling import profiling_key
from zrpc.wire import pickling
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PythonUDF", "RPCExecMode", "RemoteException", "deserialize", "serialize"]


_pickler = pickle.Pickler
_unpickler = pickle.Unpickler
_get_current_rpc_agent = agent.get_current_rpc_agent
__getattr__ = explaining("torch.distributed.rpc.internal")


class PythonUDF(NamedTuple):
    """A call: what travels in a request."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any


class RemoteException(NamedTuple):
    """What torch answers with when a function raised. zrpc sends the exception itself; the name is for programs."""

    msg: str
    exception_type: type[BaseException]


class _InternalRPCPickler:
    """zrpc's pickler with torch's methods. Programs derive theirs from it and hand it to `_use_rpc_pickler`."""

    def __init__(self) -> None:
        self._class_reducer_dict: dict[type, Callable[[Any], Any]] = {}

    def _register_reducer(self, obj_class: type, reducer: Callable[[Any], Any]) -> None:
        """From now on pickle objects of exactly that class as `reducer` says. A class's first reducer stays."""
        if obj_class not in self._class_reducer_dict:
            self._class_reducer_dict[obj_class] = reducer
            pickling.register_reducer(obj_class, reducer)

    def serialize(self, obj: Any) -> tuple[bytes, list[torch.Tensor]]:
        """Take `obj` apart into a stream and the tensors that it refers to."""
        payload = pickling.dumps(obj, whole=True)
        payload.has_left()  # whoever sends these bytes does not say so
        return bytes(payload.data), payload.tensors

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        """Put together again what `serialize` took apart."""
        return pickling.loads(Payload(binary_data, list(tensor_table)))


def _run_function(python_udf: Any) -> Any:
    """Run a `PythonUDF`: its result, or a `RemoteException` that `_handle_exception` raises."""
    try:
        if isinstance(python_udf, AttributeError):
            raise python_udf
        return python_udf.func(*python_udf.args, **python_udf.kwargs)
    except Exception as error:
        text = f"On {current_agent().info}:\n{error!r}\n{traceback.format_exc()}"
        print(text, file=sys.stderr)
        return RemoteException(text, type(error))


def _handle_exception(result: object) -> None:
    """Raise what `result` tells of, if it is a `RemoteException`."""
    if not isinstance(result, RemoteException):
        return
    try:
        error = result.exception_type(result.msg)
    except BaseException as failure:
        raise RuntimeError(
            f"Failed to create original exception type. Error msg was {failure}. "
            f"Original exception on remote side was {result.msg}"
        ) from failure
    raise error


_internal_rpc_pickler = _InternalRPCPickler()


def serialize(obj: Any) -> tuple[bytes, list[torch.Tensor]]:
    """See `_InternalRPCPickler.serialize`."""
    return _internal_rpc_pickler.serialize(obj)


def deserialize(binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
    """See `_InternalRPCPickler.deserialize`."""
    return _internal_rpc_pickler.deserialize(binary_data, tensor_table)


def _build_rpc_profiling_key(
    exec_type: RPCExecMode, func_name: str, current_worker_name: str, dst_worker_name: str
) -> str:
    return profiling_key(exec_type, func_name, current_worker_name, dst_worker_name)


def _start_record_function(
    exec_type: RPCExecMode, func_name: str, current_worker_name: str, dest_worker_name: str
) -> Any:
    """Begin to record a call under its name in the profile of this thread; the caller ends it.

    Raises:
        AssertionError: this thread does not profile.
    """
    autograd: Any = torch.autograd
    if not autograd._profiler_enabled():
        raise AssertionError("the autograd profiler should be enabled on this thread")
    key = profiling_key(exec_type, str(func_name), current_worker_name, dest_worker_name)
    recorded: Any = torch.autograd.profiler.record_function(key)
    recorded.__enter__()
    return recorded
