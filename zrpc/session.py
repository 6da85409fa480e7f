"""Being a worker for the length of a block: `init_rpc` and `shutdown` as a context, for plain and asyncio programs.

Threads: the asynchronous form runs both on a thread of asyncio's, so that the event loop goes on meanwhile.

Failure: a block that raises does not wait for the others, which may wait for this worker's calls; they see it leave.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from zrpc import draining
from zrpc.config import DEFAULT_SHUTDOWN_TIMEOUT_S
from zrpc.errors import NotInitializedError
from zrpc.lifecycle import init_rpc, shutdown

if TYPE_CHECKING:
    from types import TracebackType

    from zrpc.config import RpcBackendOptions


class session:  # it reads as a verb: `async with rpc.session(...)`
    """`init_rpc` at the beginning of a `with` or `async with` block, and `shutdown` at its end.

    The shutdown is graceful unless the block raises, or has shut down already. Arguments and errors are those of
    `init_rpc` and `shutdown`; a session may be entered again after its end.

    Args:
        name: this worker's name.
        rank: this worker's rank.
        world_size: how many workers the group has; None: it may grow and shrink.
        rpc_backend_options: everything else.
        shutdown_timeout: see `timeout` of `shutdown`, in seconds.
    """

    def __init__(
        self,
        name: str,
        rank: int = -1,
        world_size: int | None = None,
        rpc_backend_options: RpcBackendOptions | None = None,
        *,
        shutdown_timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S,
    ) -> None:
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._options = rpc_backend_options
        self._shutdown_timeout_s = shutdown_timeout

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(kind is not None)

    async def __aenter__(self) -> None:
        draining.install_handler()  # signal handlers belong to the main thread
        begun = asyncio.ensure_future(asyncio.to_thread(self._begin))
        try:
            await asyncio.shield(begun)
        except asyncio.CancelledError:
            with suppress(Exception):
                await begun  # `init_rpc` ends within its time limit, and is not to leave a worker behind
                await asyncio.to_thread(self._end, True)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._end, kind is not None)

    def _begin(self) -> None:
        init_rpc(self._name, rank=self._rank, world_size=self._world_size, rpc_backend_options=self._options)

    def _end(self, has_failed: bool) -> None:
        with suppress(NotInitializedError):
            shutdown(graceful=not has_failed, timeout=self._shutdown_timeout_s)
