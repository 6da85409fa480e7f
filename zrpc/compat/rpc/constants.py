"""torch.distributed.rpc.constants: the defaults, under the names that programs know."""

from __future__ import annotations

from datetime import timedelta

from zrpc.config import (
    DEFAULT_INIT_METHOD,
    DEFAULT_NUM_WORKER_THREADS,
    DEFAULT_RPC_TIMEOUT_S,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
    UNSET_RPC_TIMEOUT_S,
)

DEFAULT_RPC_TIMEOUT_SEC: float = DEFAULT_RPC_TIMEOUT_S
DEFAULT_SHUTDOWN_TIMEOUT: float = DEFAULT_SHUTDOWN_TIMEOUT_S
UNSET_RPC_TIMEOUT: float = UNSET_RPC_TIMEOUT_S
DEFAULT_PROCESS_GROUP_TIMEOUT: timedelta = timedelta(milliseconds=2**31 - 1)
"""Only for programs that read it: zrpc needs no process group."""

__all__ = [
    "DEFAULT_INIT_METHOD",
    "DEFAULT_NUM_WORKER_THREADS",
    "DEFAULT_PROCESS_GROUP_TIMEOUT",
    "DEFAULT_RPC_TIMEOUT_SEC",
    "DEFAULT_SHUTDOWN_TIMEOUT",
    "UNSET_RPC_TIMEOUT",
]
