"""What a worker frees for others: destructors and log handlers of users, which may take long and may wait."""

from __future__ import annotations

import gc
import logging
import threading
from typing import TYPE_CHECKING

import zrpc as rpc
from tests.waiting import until

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LIMIT_S = 20.0

_begun = threading.Event()
_told = threading.Event()
_ended: list[bool] = []
"""Of each destructor that has run: whether the worker was called meanwhile."""


def wait_begun() -> bool:
    return _begun.wait(LIMIT_S)


def tell() -> None:
    _told.set()


def wait_ended() -> list[bool]:
    until(lambda: _ended, "the destructor has ended")
    return _ended


def call_while_it_is_freed(name: str) -> None:
    """A call to the worker whose destructor runs, and waits for it."""
    assert rpc.rpc_sync(name, wait_begun, timeout=LIMIT_S)
    rpc.rpc_async(name, tell, timeout=2 * LIMIT_S).wait()


class WaitsWhenFreed:
    """Its destructor waits until this worker was called."""

    def __del__(self) -> None:
        _begun.set()
        _ended.append(_told.wait(LIMIT_S))


# ---- values of RRefs ------------------------------------------------------------------------------------------------


def drop_a_value(rank: int) -> list[bool] | None:
    """Worker 1 owns the value; its main thread waits, and so reads, while worker 0 drops the last reference."""
    if rank == 1:
        rpc.rpc_sync("worker0", wait_told, timeout=3 * LIMIT_S)
        return None
    ref = rpc.remote("worker1", WaitsWhenFreed)
    until(ref.confirmed_by_owner, "the owner knows of it")
    del ref
    gc.collect()
    call_while_it_is_freed("worker1")
    ended = rpc.rpc_sync("worker1", wait_ended)
    tell()
    return ended


def wait_told() -> bool:
    return _told.wait(3 * LIMIT_S)


def test_a_worker_is_served_while_the_destructor_of_a_value_runs(cluster: Cluster) -> None:
    """Its last reference is dropped by another worker, while the main thread of the owner waits for a call."""
    ended, _ = cluster.run(drop_a_value, 2)
    assert ended == [True]


# ---- futures whose errors no thread asked for -----------------------------------------------------------------------


class NeedsLock(logging.Handler):
    """A handler of the log that needs a lock of the program, and calls another worker."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__()
        self.program_lock = lock
        self.got: list[bool] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Expected error" in record.getMessage():
            has_lock = self.program_lock.acquire(timeout=LIMIT_S)
            if has_lock:
                self.program_lock.release()
            self.got.append(has_lock and rpc.rpc_sync("worker1", abs, args=(-1,)) == 1)


def fail() -> None:
    raise ValueError("Expected error")


def drop_a_failed_future(rank: int) -> None:
    if rank == 1:
        return
    lock = threading.Lock()
    handler = NeedsLock(lock)
    logging.getLogger("zrpc").addHandler(handler)
    future = rpc.rpc_async("worker1", fail)
    until(future.done, "it has failed")
    with lock:
        del future
        gc.collect()
    until(lambda: handler.got, "it is logged")
    logging.getLogger("zrpc").removeHandler(handler)
    assert handler.got == [True], "the handler had to wait for the thread that dropped the future"


def test_a_future_that_is_dropped_logs_its_error_where_nothing_is_held(cluster_in_each_mode: Cluster) -> None:
    """The log's handler needs a lock that the thread holds which drops it, and makes a call."""
    cluster_in_each_mode.run(drop_a_failed_future, 2)
