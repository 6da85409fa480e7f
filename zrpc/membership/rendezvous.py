"""From an `init_method` to a torch Store, through torch's own rendezvous handlers."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlparse

from zrpc.errors import ConfigError, RendezvousError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch.distributed as dist

    from zrpc.membership.store import Store


class _Generations:
    """Keeps apart the groups that one process is in, one after the other, over one store.

    Static groups are numbered: the n-th of one process is the n-th of the others. Whoever is in a dynamic group may
    leave and come back while the others stay, so all of its times in one are the same generation.
    """

    def __init__(self) -> None:
        self._next = 0
        self._dynamic = False

    def enter(self, dynamic: bool) -> int:
        """The generation of the group that this process is about to join."""
        if self._dynamic and not dynamic:
            self._next += 1
        self._dynamic = dynamic
        generation = self._next
        if not dynamic:
            self._next += 1
        return generation


_generations = _Generations()
_kept_alive: list[Iterator[Any]] = []


def resolve_rank(rank: int, world_size: int | None, init_method: str) -> tuple[int, int | None]:
    """Rank and world size. Where the call left the rank out, RANK and WORLD_SIZE say what it did not.

    A rank without a world size is that of a group that grows, as in torch.

    Raises:
        ConfigError: one of them, or a variable, is no whole number, or the rank in a static group is not one of 0 to
            world_size - 1.
    """
    for what, value in (("rank", rank), ("world_size", world_size)):
        if not isinstance(value, int | None) or isinstance(value, bool) or (value is None and what == "rank"):
            raise ConfigError(f"{what} must be a whole number, not {value!r}")
    if rank < 0:
        rank = _int_from_env("RANK", -1)
        if world_size is None:
            world_size = _int_from_env("WORLD_SIZE", 0) or None
    if world_size is not None and world_size < 1:
        raise ConfigError(f"world_size must be 1 or more, or None for a group that grows and shrinks, not {world_size}")
    if world_size is not None and not init_method.startswith("broker://") and not 0 <= rank < world_size:
        raise ConfigError(
            f"rank {rank} is not one of 0 to {world_size - 1}: pass rank=, or set RANK, as torchrun and zrpc launch do"
        )
    return rank, world_size


def open_store(init_method: str, rank: int, world_size: int | None, timeout_s: float) -> Store:
    """The store that `init_method` names, fresh for this `init_rpc` of the process.

    Workers of static groups call `init_rpc` and `shutdown` in step: the n-th `init_rpc` of one meets the n-th of the
    others.

    Raises:
        ConfigError: `init_method`, or an environment variable that it needs, cannot be used, or its file's folder is
            not there.
        RendezvousError: the store's host does not answer within `timeout_s` seconds.
    """
    import torch.distributed as dist

    url = urlparse(init_method)
    folder = os.path.dirname(url.path)
    if url.scheme == "file" and not os.path.isdir(folder):  # torch would try for ever
        raise ConfigError(f"init_method {init_method!r} cannot be used: there is no folder {folder!r}")
    timeout = timedelta(seconds=timeout_s)
    try:
        if world_size is None:
            store = _open_dynamic(init_method, rank, timeout)
        else:
            handler = dist.rendezvous(init_method, rank, world_size, timeout=timeout)
            store = next(handler)[0]
            _kept_alive.append(handler)
    except ValueError as error:
        raise ConfigError(f"init_method {init_method!r} cannot be used: {error}") from error
    except RuntimeError as error:
        raise RendezvousError(
            f"the store of init_method {init_method!r} (MASTER_ADDR={os.environ.get('MASTER_ADDR')}, "
            f"MASTER_PORT={os.environ.get('MASTER_PORT')}) cannot be reached: {error}. "
            "Check the address, and that rank 0 runs"
        ) from error
    store.set_timeout(timeout)
    prefixed = dist.PrefixStore(f"zrpc/{_generations.enter(world_size is None)}", store)
    return cast("Store", prefixed)  # torch's stubs deny that `set` takes bytes


def _open_dynamic(init_method: str, rank: int, timeout: timedelta) -> dist.Store:
    """The store of a group without a fixed size. Whoever has rank 0 hosts it, as in a static group."""
    import torch.distributed as dist

    url = urlparse(init_method)
    if url.scheme == "file":
        return dist.FileStore(url.path, -1)
    host, port = url.hostname, url.port
    if url.scheme == "env":
        host, port = os.environ.get("MASTER_ADDR"), _int_from_env("MASTER_PORT", 0)
    if not host or not port:
        raise ValueError("it needs a host and a port: tcp://host:port, or MASTER_ADDR and MASTER_PORT for env://")
    return dist.TCPStore(host, port, None, is_master=rank == 0, timeout=timeout, multi_tenant=True)


def _int_from_env(variable: str, default: int) -> int:
    value = os.environ.get(variable)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"the environment variable {variable} must be a whole number, not {value!r}") from error
