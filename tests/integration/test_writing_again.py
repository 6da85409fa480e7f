"""Who sends a tensor may write to it again when docs/gotchas.md says so, and what arrived does not change.

A writer changes a tensor as soon as it may, over and over; the receiver looks at every element of what came, at once
and once more later, and never finds two numbers in one tensor.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zrpc as rpc
from tests.integration.test_ownership import (
    CHUNK_MIN_NBYTES,
    CHUNK_NBYTES,
    CHUNKS,
    COPY_MAX_NBYTES,
    FRAME,
    INLINE,
    SLAB,
    meet,
    until,
)  # fmt: skip
from zrpc import errors
from zrpc.gather import all_gather
from zrpc.transport import chunks, local_link, socket_link

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

SIZES = {INLINE: 4_096, FRAME: 60_000, SLAB: 300_000, CHUNKS: 1_000_000}
"""Bytes that take a path."""
LARGE_FRAME_NBYTES = 1_000_000
"""Sent without a copy: what takes less is copied by ZeroMQ's binding."""
ROUNDS = int(os.environ.get("ZRPC_ROUNDS", "300"))
"""Messages a thread."""
WINDOW = 4
"""Calls that a thread has on their way at once."""
PATIENCE_S = 50.0

_seen: deque[tuple[Tensor, int]] = deque(maxlen=50)
_state: dict[int, Tensor] = {}


def is_all(tensor: Tensor, number: int) -> bool:
    return bool((tensor == number).all())


def look(tensor: Tensor, number: int) -> None:
    """Look at what came, and again at what came some time ago."""
    assert is_all(tensor, number), f"{tensor.unique()[:5]} instead of {number}"
    _seen.append((tensor, number))
    earlier, its_number = _seen[0]
    assert is_all(earlier, its_number), f"{its_number} has become {earlier.unique()[:5]}"


def tensors(nbytes: int) -> list[Tensor]:
    return [torch.zeros(nbytes // 4, dtype=torch.int32) for _ in range(WINDOW)]


# ---- one thread for each kind of sender ------------------------------------------------------------------------------


def after_rpc_sync(to: str, nbytes: int) -> None:
    tensor, *_ = tensors(nbytes)
    for number in range(ROUNDS):
        tensor.fill_(number)
        rpc.rpc_sync(to, look, args=(tensor, number))


def after_the_future_is_done(to: str, nbytes: int) -> None:
    free = deque(tensors(nbytes))
    under_way: deque[tuple[torch.futures.Future[None], Tensor]] = deque()
    for number in range(ROUNDS):
        if not free:
            future, tensor = under_way.popleft()
            future.wait()
            free.append(tensor)
        tensor = free.popleft()
        tensor.fill_(number)
        under_way.append((rpc.rpc_async(to, look, args=(tensor, number)), tensor))
    for future, _ in under_way:
        future.wait()


def in_a_callback(to: str, nbytes: int) -> None:
    done = threading.Semaphore(0)

    def send(tensor: Tensor, number: int) -> None:
        tensor.fill_(number)
        future = rpc.rpc_async(to, look, args=(tensor, number))
        future.add_done_callback(lambda future: go_on(future, tensor, number + WINDOW))

    def go_on(future: torch.futures.Future[None], tensor: Tensor, number: int) -> None:
        future.value()
        if number < ROUNDS:
            send(tensor, number)
        else:
            done.release()

    for first, tensor in enumerate(tensors(nbytes)):
        send(tensor, first)
    for _ in range(WINDOW):
        assert done.acquire(timeout=PATIENCE_S), "a callback failed or was not called"


def after_the_owner_has_confirmed(to: str, nbytes: int) -> None:
    tensor, *_ = tensors(nbytes)
    for number in range(ROUNDS):
        tensor.fill_(number)
        rref = rpc.remote(to, look, args=(tensor, number))
        rref._get_future().wait()
        tensor.fill_(-1)
        rref.to_here()


def after_a_result_was_received(to: str, nbytes: int) -> None:
    """The callee writes to what it returned when the caller, who has it, says so."""
    me = threading.get_ident()
    for number in range(ROUNDS):
        rpc.rpc_sync(to, write_to_state, args=(me, number, nbytes))
        look(rpc.rpc_sync(to, state, args=(me,)), number)


def write_to_state(key: int, number: int, nbytes: int) -> None:
    if key not in _state:
        _state[key] = torch.zeros(nbytes // 4, dtype=torch.int32)
    _state[key].fill_(number)


def state(key: int) -> Tensor:
    return _state[key]


SENDERS: list[Callable[[str, int], None]] = [
    after_rpc_sync,
    after_the_future_is_done,
    in_a_callback,
    after_the_owner_has_confirmed,
    after_a_result_was_received,
]


def write_again(rank: int, path: str, nbytes: int) -> None:
    if path == CHUNKS:
        chunks.ENCRYPTED_MIN_NBYTES, chunks.CHUNK_NBYTES = CHUNK_MIN_NBYTES, CHUNK_NBYTES
        socket_link.SEND_COPY_MAX_NBYTES = local_link.SEND_COPY_MAX_NBYTES = COPY_MAX_NBYTES
    meet(rank, path)
    failed: list[str] = []

    def run(sender: Callable[[str, int], None]) -> None:
        try:
            sender(f"worker{1 - rank}", nbytes)
        except BaseException as error:
            failed.append(f"{sender.__name__}: {error!r}")

    threads = [threading.Thread(target=run, args=(sender,)) for sender in SENDERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    all_gather(None)
    _seen.clear()  # it would keep what arrived after the shutdown


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
@pytest.mark.parametrize(
    ("path", "nbytes"), [*SIZES.items(), (FRAME, LARGE_FRAME_NBYTES)], ids=[*SIZES, "frame that is not copied"]
)
def test_what_arrived_does_not_change(cluster_in_each_mode: Cluster, path: str, nbytes: int) -> None:
    shared = path in (INLINE, SLAB)
    cluster_in_each_mode.run(write_again, 2, args=(path, nbytes), shared_memory=shared, timeout_s=100)


# ---- calls that timed out --------------------------------------------------------------------------------------------

UNREAD_NBYTES = 64 << 20
"""More than the system's socket buffers take."""


def stop() -> None:
    """Stand still, in the middle of everything, until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def pid() -> int:
    return os.getpid()


def time_out(rank: int) -> None:
    if rank == 0:
        callee = rpc.rpc_sync("worker1", pid)
        stopped = rpc.rpc_async("worker1", stop)
        until(lambda: is_stopped(callee), "the callee has stopped")
        array = np.zeros(UNREAD_NBYTES, np.uint8)
        held = weakref.ref(array)
        try:
            with pytest.raises(errors.RpcTimeoutError):
                rpc.rpc_sync("worker1", sum_of, args=(array,), timeout=0.2)
            array[:] = 1  # allowed, but what the callee then sees is anything
            del array
            gc.collect()
            assert held() is not None, "the memory of a message that has not left was freed"
        finally:
            os.kill(callee, signal.SIGCONT)
        stopped.wait()
        until(lambda: held() is None, "the memory is free again")
        assert 0 <= rpc.rpc_sync("worker1", total) <= UNREAD_NBYTES
    all_gather(None)


def is_stopped(process: int) -> bool:
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "T"


_sums: queue.SimpleQueue[int] = queue.SimpleQueue()


def sum_of(array: Any) -> None:
    _sums.put(int(array.sum()))


def total() -> int:
    return _sums.get(timeout=PATIENCE_S)


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
def test_the_memory_of_a_call_that_timed_out_is_held_until_it_has_left(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(time_out, 2, shared_memory=False, propagate_deadlines=False)
