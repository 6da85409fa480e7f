"""The functions of torch._C._distributed_rpc that send one call each, for programs that bypass rpc_async and remote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zrpc import interrupts
from zrpc.agent.current import current_agent
from zrpc.agent.future import Future, future_of
from zrpc.config import UNSET_RPC_TIMEOUT_S
from zrpc.rref.making import remote_builtin, remote_python
from zrpc.wire import pickling, values
from zrpc.wire.messages import BuiltinCall, PythonCall
from zrpc.wire.payload import Payload
from zrpc.wire.scripting import find_function

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from zrpc.ids import WorkerInfo
    from zrpc.rref.rref import RRef

UNSET = UNSET_RPC_TIMEOUT_S


def invoke_rpc_builtin(
    dst: WorkerInfo, op_name: str, rpc_timeout: float = UNSET, *args: Any, **kwargs: Any
) -> Future[Any]:
    """Call the torch operator `op_name`, such as `aten::add`."""
    return _request(dst, BuiltinCall(op_name), values.pack((args, kwargs)), rpc_timeout)


def invoke_rpc_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[torch.Tensor],
    rpc_timeout: float = UNSET,
    is_async_execution: bool = False,
) -> Future[Any]:
    """Call what `internal.serialize(PythonUDF(...))` gave."""
    return _request(dst, PythonCall(is_async_execution), Payload(pickled_python_udf, list(tensors)), rpc_timeout)


def invoke_rpc_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rpc_timeout: float = UNSET,
    is_async_execution: bool = False,
) -> Future[Any]:
    """Call the TorchScript function of that qualified name."""
    payload = pickling.dumps((find_function(qualified_name), tuple(args), dict(kwargs)), keep_graph=True)
    return _request(_resolve(dst_worker_name), PythonCall(is_async_execution), payload, rpc_timeout)


def invoke_remote_builtin(
    dst: WorkerInfo, op_name: str, rpc_timeout: float = UNSET, *args: Any, **kwargs: Any
) -> RRef[Any]:
    """As `invoke_rpc_builtin`, and leave the result there."""
    return remote_builtin(current_agent(), _resolve(dst), op_name, values.pack((args, kwargs)), _limit_s(rpc_timeout))


def invoke_remote_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[torch.Tensor],
    rpc_timeout: float = UNSET,
    is_async_execution: bool = False,
) -> RRef[Any]:
    """As `invoke_rpc_python_udf`, and leave the result there."""
    payload = Payload(pickled_python_udf, list(tensors))
    return remote_python(current_agent(), _resolve(dst), payload, _limit_s(rpc_timeout), is_async_execution)


def invoke_remote_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    rpc_timeout: float = UNSET,
    is_async_execution: bool = False,
    *args: Any,
    **kwargs: Any,
) -> RRef[Any]:
    """As `invoke_rpc_torchscript`, and leave the result there."""
    payload = pickling.dumps((find_function(qualified_name), args, kwargs), keep_graph=True)
    to, limit_s = _resolve(dst_worker_name), _limit_s(rpc_timeout)
    return remote_python(current_agent(), to, payload, limit_s, is_async_execution)


def _request(dst: WorkerInfo, message: BuiltinCall | PythonCall, payload: Payload, timeout: float) -> Future[Any]:
    agent = current_agent()
    with interrupts.deferred:
        call = agent.request(_resolve(dst), message, payload, timeout_s=_limit_s(timeout), hooked=True)
        return future_of(call, pickling.loads, agent.completions)


def _resolve(to: str | WorkerInfo) -> WorkerInfo:
    return current_agent().resolve(to)


def _limit_s(timeout: float) -> float | None:
    return None if timeout == UNSET else timeout
