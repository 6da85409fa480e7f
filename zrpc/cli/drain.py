"""`zrpc drain`: a member for a moment, which tells a worker to take no new calls."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

OBSERVER_RANKS = 1 << 30
"""Ranks from here on are those of commands: no worker has one of them, so that none is refused its own."""
TIMEOUT_S = 30.0


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
        ZrpcError: as `attached`.
    """
    from zrpc.draining import drain_worker

    with attached(init_method):
        drain_worker(worker)
