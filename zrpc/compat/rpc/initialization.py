"""Becoming a worker: `init_rpc` with torch's arguments."""

from __future__ import annotations

import logging
import numbers
from typing import Any

from torch._C._distributed_c10d import Store

from zrpc import lifecycle
from zrpc.agent.current import is_agent_set
from zrpc.compat.rpc import api, backend_registry
from zrpc.compat.rpc.options import RpcBackendOptions
from zrpc.config import BROKER_SCHEME
from zrpc.errors import AlreadyInitializedError, ConfigError
from zrpc.membership.rendezvous import resolve_rank

logger = logging.getLogger(__name__)


def init_rpc(
    name: str,
    backend: Any = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: Any = None,
) -> None:
    """As `zrpc.init_rpc`, with torch's checks of the arguments.

    Raises:
        TypeError: `backend` is no backend, or the options are none or not those of `backend`.
        ValueError: no rank was given.
        RuntimeError: see `zrpc.init_rpc`.
    """
    if backend is not None and not backend_registry.is_backend(backend):
        raise TypeError("Argument backend must be a member of BackendType")
    if rpc_backend_options is not None and not isinstance(rpc_backend_options, RpcBackendOptions):
        raise TypeError("Argument rpc_backend_options must be an instance of RpcBackendOptions")
    if backend is None:
        backend = _backend_of(rpc_backend_options)
    if rpc_backend_options is None:
        rpc_backend_options = backend_registry.construct_rpc_backend_options(backend)
    if is_agent_set():
        raise AlreadyInitializedError("RPC is already initialized: call shutdown() before init_rpc() again")
    if backend.name == backend_registry.OWN:
        backend_registry.check_options(rpc_backend_options)
    init_method = lifecycle.init_method_of(rpc_backend_options)
    if init_method.startswith(BROKER_SCHEME):
        lifecycle.init_rpc(name, None, rank, world_size, rpc_backend_options)
        return
    rank, world_size = resolve_rank(rank, world_size or None, init_method)
    if rank < 0:
        by_env = init_method.startswith("env://")
        missing = "environment variable RANK expected, but not set" if by_env else "rank parameter missing"
        raise ConfigError(f"{missing}: pass rank= to init_rpc, or set RANK")
    store = lifecycle.rendezvous(init_method, rank, world_size, rpc_backend_options)
    _init_rpc_backend(backend, store, name, rank, world_size, rpc_backend_options)


def _backend_of(rpc_backend_options: Any) -> Any:
    """The backend whose options these are."""
    if rpc_backend_options is None:
        return backend_registry.BackendType[backend_registry.OWN]
    for backend in backend_registry.BackendType:
        if isinstance(rpc_backend_options, type(backend_registry.construct_rpc_backend_options(backend))):
            if backend.name != backend_registry.OWN:
                logger.warning("init_rpc takes the backend %r, whose options were given: pass backend= too", backend)
            return backend
    raise TypeError(f"Could not infer backend for options {rpc_backend_options}")


def _init_rpc_backend(
    backend: Any = None,
    store: Any = None,
    name: Any = None,
    rank: Any = -1,
    world_size: Any = None,
    rpc_backend_options: Any = None,
) -> None:
    """`init_rpc` with a store that is there already.

    Raises:
        RuntimeError: an argument is of another type, or this process is a worker already.
    """
    _validate_rpc_args(backend, store, name, rank, world_size, rpc_backend_options)
    if is_agent_set():
        raise AlreadyInitializedError("RPC is already initialized: call shutdown() before init_rpc() again")
    agent = backend_registry.init_backend(
        backend or backend_registry.BackendType[backend_registry.OWN],
        store=store,
        name=name,
        rank=rank,
        world_size=world_size,
        rpc_backend_options=rpc_backend_options,
    )
    api._init_rpc_states(agent)


def _validate_rpc_args(
    backend: Any, store: Any, name: Any, rank: Any, world_size: Any, rpc_backend_options: Any
) -> None:
    """Check the types of what `init_rpc` is given.

    Raises:
        RuntimeError: an argument is of another type.
    """
    del backend
    wanted: tuple[tuple[Any, Any], ...] = (
        (store, Store),
        (name, str),
        (rank, numbers.Integral),
        (world_size, numbers.Integral | None),
        (rpc_backend_options, RpcBackendOptions),
    )
    for argument, cls in wanted:
        if not isinstance(argument, cls):
            raise RuntimeError(f"Argument {argument} must be of type {cls} but got type {type(argument)}")
