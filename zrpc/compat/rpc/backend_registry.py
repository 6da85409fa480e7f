"""torch.distributed.rpc.backend_registry: backends by name.

There is one backend, zrpc's, and it answers to TENSORPIPE. Others may be registered; what their handler makes must be
an agent of this package for calls to work.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple

from zrpc import lifecycle
from zrpc.compat.missing import explaining
from zrpc.compat.rpc import api
from zrpc.compat.rpc.constants import (
    DEFAULT_INIT_METHOD,
    DEFAULT_NUM_WORKER_THREADS,
    DEFAULT_PROCESS_GROUP_TIMEOUT,
    DEFAULT_RPC_TIMEOUT_SEC,
)
from zrpc.compat.rpc.options import TensorPipeRpcBackendOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.compat.agent import TensorPipeAgent
    from zrpc.membership.counter import Store

__all__ = [
    "BackendType",
    "BackendValue",
    "backend_registered",
    "construct_rpc_backend_options",
    "init_backend",
    "register_backend",
]

OWN = "TENSORPIPE"
"""The name under which zrpc's backend is registered."""


class BackendValue(NamedTuple):
    """How a backend makes its options and its agent."""

    construct_rpc_backend_options_handler: Callable[..., Any]
    init_backend_handler: Callable[..., Any]


_make_enum: Any = enum.Enum  # the members of the enumeration made here are known at run time only


def _repr(self: enum.Enum) -> str:
    return f"BackendType.{self.name}"


def _enum_of(members: dict[str, BackendValue]) -> Any:
    made: Any = _make_enum("BackendType", members, module=__name__)
    made.__repr__ = _repr
    made.__doc__ = "The backends there are; `register_backend` replaces this class by one that has the new one too."
    return made


BackendType: Any = _enum_of({})


_backend_type_repr = _repr
_backend_type_doc = str(BackendType.__doc__)
__getattr__ = explaining("torch.distributed.rpc.backend_registry")


def is_backend(value: object) -> bool:
    """Whether `value` is a member of `BackendType`, as it is now or as it was before a backend was registered."""
    return isinstance(value, enum.Enum) and isinstance(value.value, BackendValue)


def backend_registered(backend_name: str) -> bool:
    """Whether there is a backend of that name."""
    return backend_name in BackendType.__members__


def register_backend(
    backend_name: str,
    construct_rpc_backend_options_handler: Callable[..., Any],
    init_backend_handler: Callable[..., Any],
) -> Any:
    """Add a backend.

    Args:
        backend_name: its name in `BackendType`.
        construct_rpc_backend_options_handler: called by `construct_rpc_backend_options`.
        init_backend_handler: called by `init_rpc` with store, name, rank, world_size and rpc_backend_options; returns
            the agent.

    Returns:
        The new member of `BackendType`.

    Raises:
        RuntimeError: there is one of that name.
    """
    global BackendType
    if backend_registered(backend_name):
        raise RuntimeError(f"RPC backend {backend_name}: already registered")
    members = {member.name: member.value for member in BackendType}
    members[backend_name] = BackendValue(construct_rpc_backend_options_handler, init_backend_handler)
    BackendType = _enum_of(members)
    return BackendType[backend_name]


def construct_rpc_backend_options(
    backend: Any,
    rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
    init_method: str = DEFAULT_INIT_METHOD,
    **kwargs: Any,
) -> Any:
    """Options for `backend`."""
    return backend.value.construct_rpc_backend_options_handler(rpc_timeout, init_method, **kwargs)


def init_backend(backend: Any, *args: Any, **kwargs: Any) -> Any:
    """The agent that `backend` makes."""
    return backend.value.init_backend_handler(*args, **kwargs)


def _construct_options(
    rpc_timeout: float,
    init_method: str,
    num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
    device_maps: Any = None,
    devices: Any = None,
    **_: Any,
) -> TensorPipeRpcBackendOptions:
    """Options of zrpc's backend; what it does not know, `_transports` among them, is not used."""
    return TensorPipeRpcBackendOptions(
        rpc_timeout=rpc_timeout,
        init_method=init_method,
        num_worker_threads=num_worker_threads,
        device_maps=device_maps,
        devices=devices,
    )


def check_options(rpc_backend_options: object) -> TensorPipeRpcBackendOptions:
    """`rpc_backend_options`, if they are for zrpc's backend.

    Raises:
        TypeError: they are not.
    """
    if not isinstance(rpc_backend_options, TensorPipeRpcBackendOptions):
        raise TypeError(f"`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`, not {rpc_backend_options!r}")
    return rpc_backend_options


def _init_backend(
    store: Store, name: str, rank: int, world_size: int | None, rpc_backend_options: object
) -> TensorPipeAgent:
    lifecycle.start_worker(name, rank, world_size or None, check_options(rpc_backend_options), store)
    agent = api._get_current_rpc_agent()
    agent.set_store(store)
    return agent


def _init_process_group(store: Any, rank: int, world_size: int) -> Any:
    """A Gloo process group on `store`, for backends of programs; zrpc's own needs none.

    Raises:
        RuntimeError: the group has another rank or size.
    """
    import torch.distributed as dist

    group = dist.ProcessGroupGloo(store, rank, world_size, DEFAULT_PROCESS_GROUP_TIMEOUT)
    if rank not in (-1, group.rank()):
        raise RuntimeError(f"rank argument {rank} doesn't match pg rank {group.rank()}")
    if world_size not in (-1, group.size()):
        raise RuntimeError(f"world_size argument {world_size} doesn't match pg size {group.size()}")
    return group


_tensorpipe_construct_rpc_backend_options_handler = _construct_options
_tensorpipe_init_backend_handler = _init_backend
register_backend(OWN, _construct_options, _init_backend)
