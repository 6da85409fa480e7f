"""A system that gives a worker no more threads for a while: afterwards everything works, time limits included."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from zrpc.agent.current import is_agent_set
from zrpc.errors import LimitError, RpcTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.harness import Cluster

LARGE = 16 << 20
"""Bytes: several threads copy so many."""
LIMIT_S = 30.0

_freed = threading.Event()
_end = threading.Event()


@contextmanager
def no_more_threads(but: int = 0) -> Iterator[None]:
    """Refuse this process every thread after the next `but` ones."""
    start = threading.Thread.start
    left = [None] * but

    def refuse(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def hang() -> None:
    _end.wait(2 * LIMIT_S)


def end() -> None:
    _end.set()


class Value:
    def __del__(self) -> None:
        _freed.set()


def wait_freed() -> bool:
    return _freed.wait(LIMIT_S)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def do_without_threads(rank: int) -> None:
    if rank == 1:
        return
    x = torch.ones(LARGE, dtype=torch.uint8)
    with no_more_threads():
        for attempt in (
            lambda: rpc.rpc_async("worker1", hang, timeout=0.1),
            lambda: rpc.rpc_sync("worker1", torch.numel, args=(x,), timeout=1),
            lambda: rpc.rpc_sync("worker0", identity, args=(x,), timeout=1),
            lambda: rpc.RRef(x),
        ):
            with suppress(RuntimeError):  # some may need a thread, and say that there is none
                attempt()
            gc.collect()
    done = threading.Event()
    limited = rpc.rpc_async("worker1", hang, timeout=0.1)
    limited.add_done_callback(lambda _: done.set())
    assert done.wait(LIMIT_S), "time limits are kept"
    with pytest.raises(RpcTimeoutError):
        limited.wait()
    rpc.rpc_sync("worker1", end)
    large = rpc.rpc_async("worker1", identity, args=(x,), timeout=LIMIT_S)
    assert torch.equal(large.wait(), x), "large tensors travel"
    held = rpc.RRef(Value())
    _freed.clear()
    rpc.rpc_sync("worker1", id, args=(held,))
    del held
    gc.collect()
    assert wait_freed(), "what is dropped is freed"


def test_once_there_are_threads_again_nothing_is_amiss(cluster_in_each_mode: Cluster) -> None:
    """Time limits are kept, large tensors travel, what is dropped is freed, and the shutdown ends."""
    cluster_in_each_mode.run(do_without_threads, 2)


def start_without_threads(rank: int, method: str) -> int:
    """Start with none but `but` threads, for ever more of them, until it works; how often it did not."""
    options = rpc.RpcBackendOptions(init_method=method)
    but = 0
    while not is_agent_set():
        with no_more_threads(but), suppress(LimitError):
            rpc.init_rpc(f"worker{rank}", rank=rank, world_size=None, rpc_backend_options=options)
        but += 1
    assert rpc.rpc_sync(f"worker{rank}", abs, args=(-1,), timeout=LIMIT_S) == 1
    limited = rpc.rpc_async(f"worker{rank}", hang, timeout=0.1)
    done = threading.Event()
    limited.add_done_callback(lambda _: done.set())
    assert done.wait(LIMIT_S)
    end()
    rpc.shutdown(graceful=False)
    return but - 1


def test_a_start_that_gets_no_thread_says_so_and_may_be_tried_again(cluster_in_each_mode: Cluster) -> None:
    """Whichever of its threads is refused."""
    cluster = cluster_in_each_mode
    (failed,) = cluster.run(start_without_threads, 1, args=(cluster.new_init_method(),), init=False)
    assert failed > 0
