"""Stand-ins for the value of an RRef: their methods run on its owner."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zrpc.agent.execution import ASYNC_ATTRIBUTE
from zrpc.agent.future import Future, settle
from zrpc.exposed import expose
from zrpc.functions import async_execution
from zrpc.wire import loading

if TYPE_CHECKING:
    from zrpc.ids import WorkerInfo
    from zrpc.rref.context import RRefContext


class Reference(Protocol):
    """What proxies need of their RRef."""

    @property
    def _context(self) -> RRefContext:
        """The references of this worker."""

    def owner(self) -> WorkerInfo:
        """The owner."""

    def local_value(self) -> Any:
        """The value, on its owner."""

    def _get_type(self, timeout: float, blocking: bool) -> Any:
        """A future for the type of the value, where `blocking` is false."""


class RRefProxy:
    """Whatever attribute is asked of it is a method of the value, to be called on the owner.

    Args:
        rref: the reference.
        rpc_api: `rpc_sync`, `rpc_async` or `remote`.
        timeout: seconds for each call; 0: no limit; -1: the agent's.
    """

    def __init__(self, rref: Reference, rpc_api: str, timeout: float) -> None:
        self.rref = rref
        self.rpc_api = rpc_api
        self.rpc_timeout = timeout

    def __getattr__(self, name: str) -> Any:
        return partial(_call_method, self.rref, self.rpc_api, name, self.rpc_timeout)


@expose
def _local_invoke(rref: Reference, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return loading.method(rref.local_value(), name)(*args, **kwargs)


@expose
@async_execution
def _local_invoke_async_execution(rref: Reference, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return loading.method(rref.local_value(), name)(*args, **kwargs)


def _call_method(rref: Reference, rpc_api: str, name: str, timeout: float, /, *args: Any, **kwargs: Any) -> Any:
    types = rref._get_type(timeout=timeout, blocking=False)
    if rpc_api != "rpc_async":
        return _invoke(rref, rpc_api, name, timeout, types.wait(), args, kwargs)
    result: Future[Any] = Future()
    hooks = rref._context.agent.hooks
    contexts = hooks.carry_over()  # of the thread that calls; another one may go on

    def go_on(known: torch.futures.Future[type]) -> None:
        try:
            with hooks.carried_over(contexts):
                called = _invoke(rref, rpc_api, name, timeout, known.value(), args, kwargs)
            result.follow(called)
            called.add_done_callback(finish)
        except Exception as error:
            result.set_exception(error)

    def finish(done: torch.futures.Future[Any]) -> None:
        settle(result, done.value)

    result.follow(types)
    types.add_done_callback(go_on)
    return result


def _invoke(
    rref: Reference,
    rpc_api: str,
    name: str,
    timeout: float,
    cls: type,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call method `name` of the value, which is a `cls`. A script module's methods are not looked at beforehand."""
    func = _local_invoke
    if not issubclass(cls, torch.jit.ScriptModule | torch._C.ScriptModule) and hasattr(
        getattr(cls, name), ASYNC_ATTRIBUTE
    ):
        func = _local_invoke_async_execution
    return getattr(rref._context.invoke, rpc_api)(rref.owner(), func, (rref, name, args, kwargs), None, timeout)
