"""`zrpc drain`: a member for a moment, which tells a worker to take no new calls.

No command can be a member of a static group, which is complete from its start: then the error says what to do instead.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zrpc.errors import RefusedError, UnknownWorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.errors import ZrpcError

OBSERVER_RANKS = 1 << 30
"""Ranks from here on are those of commands: no worker has one of them, so that none is refused its own."""
TIMEOUT_S = 30.0
_INSTEAD = (
    "A command can join groups that grow and shrink alone. In a static group drain {worker} from within: "
    "call zrpc.drain() in its program, or zrpc.rpc_sync({worker!r}, zrpc.drain, args=(SECONDS,)) in another worker's; "
    "it leaves at the end of its program"
)


@contextmanager
def attached(init_method: str) -> Iterator[None]:
    """Be a member of the group that meets at `init_method`, which grows and shrinks, for the body.

    Raises:
        RefusedError: the group is static, or has another secret.
        RendezvousError: it cannot be reached.
    """
    import zrpc as rpc

    options = rpc.RpcBackendOptions(init_method=init_method, rpc_timeout=TIMEOUT_S, num_worker_threads=1)
    pid = os.getpid()
    rpc.init_rpc(f"zrpc-command-{pid}", rank=OBSERVER_RANKS + pid, world_size=None, rpc_backend_options=options)
    try:
        yield
    finally:
        rpc.shutdown(graceful=False)


def drain(worker: str, init_method: str) -> None:
    """Have `worker` take no new calls.

    Raises:
        UnknownWorkerError: there is none.
        RefusedError: the group is static, or as `attached`.
        ZrpcError: as `attached`.
    """
    from zrpc.draining import drain_worker

    try:
        with attached(init_method):
            drain_worker(worker)
    except (RefusedError, UnknownWorkerError) as error:
        if isinstance(error, RefusedError) and not _is_of_kind(error):
            raise
        raise type(error)(f"{error}. {_INSTEAD.format(worker=worker)}") from error


def _is_of_kind(error: ZrpcError) -> bool:
    """Whether it refuses this command because the group is static."""
    return any(said in str(error) for said in ("is static", "is complete", "world_size"))
