"""From an `init_method` to a torch Store."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qs, urlparse

from zrpc.errors import ConfigError, LimitError, RefusedError, RendezvousError
from zrpc.membership.elastic_start import is_started_by_torchrun
from zrpc.membership.tcp_store import ListenError, open_tcp_store

if TYPE_CHECKING:
    import torch.distributed as dist

    from zrpc.membership.counter import Store


class _Generations:
    """Keeps apart the groups that one process is in, one after the other, over one store.

    Static groups are numbered: the n-th of one process is the n-th of the others. Whoever is in a dynamic group may
    leave and come back while the others stay, so all of its times in one are the same generation.
    """

    def __init__(self) -> None:
        self._next = 0
        self._dynamic = False

    def enter(self, dynamic: bool) -> int:
        """The generation of the group that this process joins now."""
        generation = self.next(dynamic)
        self._dynamic = dynamic
        self._next = generation if dynamic else generation + 1
        return generation

    def next(self, dynamic: bool) -> int:
        """The generation of the group that this process is about to join."""
        return self._next + 1 if self._dynamic and not dynamic else self._next


_generations: defaultdict[str, _Generations] = defaultdict(_Generations)
"""By store: an `init_rpc` elsewhere that came to nothing, as one that Ctrl-C ended, counts there alone."""
_kept_alive: list[object] = []

TAKEN_WAIT_S = 1.0
"""How long to find out whether another rank 0 has the port of the group's store."""


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
        RendezvousError: the store cannot be opened here, or its host does not answer within `timeout_s` seconds.
        RefusedError: another worker of the group is its rank 0.
    """
    import torch.distributed as dist

    url = urlparse(init_method)
    folder = os.path.dirname(url.path)
    if url.scheme == "file" and not os.path.isdir(folder):  # torch would try for ever
        raise ConfigError(f"init_method {init_method!r} cannot be used: there is no folder {folder!r}")
    try:
        if url.scheme in ("tcp", "env"):
            store = _open_tcp(init_method, rank, world_size, timeout_s)
        elif url.scheme == "file":
            store = dist.FileStore(url.path, world_size or -1)
        else:  # one that the program has registered
            handler = dist.rendezvous(init_method, rank, world_size or -1, timeout=timedelta(seconds=timeout_s))
            store = next(handler)[0]
            _kept_alive.append(handler)
    except ValueError as error:
        raise ConfigError(f"init_method {init_method!r} cannot be used: {error}") from error
    except (LimitError, RefusedError, RendezvousError):
        raise
    except RuntimeError as error:
        raise RendezvousError(f"the store of init_method {init_method!r} cannot be opened: {error}") from error
    store.set_timeout(timedelta(seconds=timeout_s))
    generation = _generations[_place_of(init_method)].enter(world_size is None)
    prefixed = dist.PrefixStore(_prefix(generation, world_size), store)
    return cast("Store", prefixed)  # torch's stubs deny that `set` takes bytes


def open_for_looking(init_method: str, timeout_s: float) -> dist.Store:
    """The store of `init_method` as it is, for a process that joins no group. Of a file it is a copy.

    Raises:
        ConfigError: `init_method` is no meeting point that can be looked at.
        RendezvousError: there is no store.
    """
    import torch.distributed as dist

    url = urlparse(init_method)
    if url.scheme == "file":
        return dist.FileStore(_copy_of(url.path), -1)
    if url.scheme not in ("tcp", "env"):
        raise ConfigError(f"init_method {init_method!r} cannot be looked at: file, tcp, env and broker can")
    try:
        _open_tcp(init_method, -1, None, timeout_s)  # it says why it cannot be reached, and waits for no name server
        host, port = (url.hostname, url.port) if url.scheme == "tcp" else _master()
        limit = timedelta(seconds=timeout_s)
        return dist.TCPStore(str(host), int(port or 0), None, False, limit, wait_for_workers=False)  # lists its keys
    except ValueError as error:
        raise ConfigError(f"init_method {init_method!r} cannot be used: {error}") from error
    except RuntimeError as error:
        if isinstance(error, LimitError | RefusedError | RendezvousError):
            raise
        raise RendezvousError(f"the store of init_method {init_method!r} cannot be opened: {error}") from error


def _master() -> tuple[str | None, int]:
    """Where `env://` says that the store is."""
    return os.environ.get("MASTER_ADDR"), _int_from_env("MASTER_PORT", 0)


def _copy_of(path: str) -> str:
    """A copy of the file of a store, for this process alone: torch counts who opens the file, and who has closed it."""
    import fcntl

    try:
        with open(path, "rb") as file, tempfile.NamedTemporaryFile(prefix="zrpc-store-", delete=False) as copy:
            atexit.register(_remove, copy.name)
            fcntl.flock(file, fcntl.LOCK_SH)  # as torch does while it writes
            shutil.copyfileobj(file, copy)
    except OSError as error:
        raise RendezvousError(f"the file of the group, {path}, cannot be read: {error.strerror}") from error
    return copy.name


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _prefix(generation: int, world_size: int | None) -> str:
    """Under what the keys of a group lie.

    torchrun's store outlives the workers that it starts again, and so does a file: `ElasticStart` keeps its rounds of
    one size apart.
    """
    if world_size is None or not is_started_by_torchrun():
        return f"zrpc/{generation}"
    return f"zrpc/torchrun-{os.environ.get('TORCHELASTIC_RUN_ID', '')}-of-{world_size}/{generation}"


def _place_of(init_method: str) -> str:
    """Where the store of `init_method` is."""
    url = urlparse(init_method)
    if url.scheme == "env":
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if url.scheme == "tcp":
        return f"{url.hostname}:{url.port}"
    return init_method


def _open_tcp(init_method: str, rank: int, world_size: int | None, timeout_s: float) -> dist.Store:
    """The store of `tcp://` and `env://`. Rank 0 hosts it, unless torchrun does."""
    url = urlparse(init_method)
    host, port = url.hostname, url.port
    if url.scheme == "env":
        host, port = _master()
    if not host or not port or not 0 < port < 1 << 16:
        raise ValueError(
            "it needs a host and a port from 1 to 65535: tcp://host:port, or MASTER_ADDR and MASTER_PORT for env://"
        )
    use_libuv = parse_qs(url.query).get("use_libuv", [os.environ.get("USE_LIBUV", "1")])[-1] == "1"
    is_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and world_size is not None
    is_host = rank == 0 and not is_torchrun
    try:
        store = open_tcp_store(host, port, is_host=is_host, timeout_s=timeout_s, use_libuv=use_libuv)
    except ListenError as error:
        if world_size is not None and _is_rank_0_taken(host, port, world_size):
            raise RefusedError(
                f"rank 0 is taken by another worker of this group, which hosts its store at {host}:{port}: "
                "start each worker with a rank of its own"
            ) from error
        raise RendezvousError(f"rank 0 cannot host the store of its group at {host}:{port}: {error}") from error
    except LimitError:
        raise  # no thread: of the store nothing is known
    except RuntimeError as error:
        raise RendezvousError(
            f"the store of init_method {init_method!r} at {host}:{port}, hosted by "
            f"{'torchrun' if is_torchrun else 'rank 0'}, cannot be reached within {timeout_s:g} s: {error}"
        ) from error
    _kept_alive.append(store)
    return store


def _is_rank_0_taken(host: str, port: int, world_size: int) -> bool:
    """Whether what listens there is the store of the group that this process is about to join, with a rank 0."""
    import torch.distributed as dist

    deadline = time.monotonic() + TAKEN_WAIT_S
    try:
        store = open_tcp_store(host, port, is_host=False, timeout_s=TAKEN_WAIT_S)
        generation = _generations[f"{host}:{port}"].next(dynamic=False)
        prefixed = dist.PrefixStore(_prefix(generation, world_size), store)
        while not prefixed.check(["rank/0"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(TAKEN_WAIT_S / 10)  # it listens, and has not said yet who it is
    except RuntimeError:
        return False
    return True


def _int_from_env(variable: str, default: int) -> int:
    value = os.environ.get(variable)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"the environment variable {variable} must be a whole number, not {value!r}") from error
