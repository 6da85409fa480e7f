"""What arrives belongs to whom it arrived at: its memory is nobody else's, and is left alone for as long as it is seen.

Memory is used again on every path but one: slabs by their sender, destination buffers of chunks by their receiver, and
receive buffers by ZeroMQ. So tensors and parts of them are kept, dropped by other threads in any order, and written to,
while later messages go through the same memory.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zrpc as rpc
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.gather import all_gather
from zrpc.transport import chunks, local_link, socket_link

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

INLINE, FRAME, SLAB, CHUNKS = "inline", "frame", "slab", "chunks"
RANGES = {INLINE: (8, 4_096), FRAME: (4_104, 60_000), SLAB: (65_536, 400_000), CHUNKS: (100_000, 500_000)}
"""Sizes in bytes that take a path."""
CHUNK_MIN_NBYTES, CHUNK_NBYTES, COPY_MAX_NBYTES = 100_000, 70_000, 65_536
"""Of smaller sizes than usual, and sent without a copy as usual."""
ROUNDS = int(os.environ.get("ZRPC_ROUNDS", "400"))
"""Messages a thread."""
THREADS = 3
KEPT_MAX = 60
SEED = int(os.environ.get("ZRPC_SEED", "3"))


def filled(seed: int, nbytes: int) -> Tensor:
    """A tensor that says which one it is in every 8 bytes."""
    return torch.full((nbytes // 8,), seed, dtype=torch.int64)


# ---- parts of a tensor that keep its memory --------------------------------------------------------------------------

PARTS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "all of it": lambda t, _: t,
    "a slice": lambda t, chance: t[chance.randrange(len(t)) :],
    "a detached slice": lambda t, chance: t.detach()[: 1 + chance.randrange(len(t))],
    "every other element": lambda t, _: t[::2],
    "its array": lambda t, _: t.numpy(),
    "a slice of its array": lambda t, chance: t.numpy()[chance.randrange(len(t)) :],
    "a view of its array's memory": lambda t, _: t.numpy().data,
    "its storage": lambda t, _: t.untyped_storage(),
    "other elements": lambda t, _: t.view(torch.uint8),
    "a tensor of its array": lambda t, _: torch.from_numpy(t.numpy()[len(t) // 2 :]),
    "one element": lambda t, _: t[-1],
}


def numbers(part: Any) -> np.ndarray[Any, Any]:
    """What a part has in its memory."""
    if isinstance(part, torch.UntypedStorage):
        part = torch.empty(0, dtype=torch.int64).set_(part)
    if isinstance(part, Tensor):
        part = part.view(torch.int64).numpy()
    return np.asarray(part)


class Keeper:
    """Keeps parts of what arrived, and drops them again, at random. The table is owned by the lock."""

    def __init__(self, seed: int) -> None:
        self.faults: list[str] = []
        self.num_checked = 0
        self.num_sent_back = 0
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._kept: list[tuple[Any, int, str]] = []

    def keep(self, arrived: Any, seed: int) -> None:
        """Look at what arrived; keep a part of it, perhaps one that is written to."""
        tensor = torch.from_numpy(arrived) if isinstance(arrived, np.ndarray) else arrived
        self.check(tensor, seed, "what arrived")
        with self._lock:
            chance = random.Random(self._chance.random())
        kind = chance.choice(list(PARTS))
        part = PARTS[kind](tensor, chance)
        if chance.random() < 0.3:
            seed = -seed
            np.asarray(numbers(part))[...] = seed
        with self._lock:
            self._kept.append((part, seed, kind))
            dropped = []
            while len(self._kept) > KEPT_MAX * self._chance.random():
                dropped.append(self._kept.pop(self._chance.randrange(len(self._kept))))
        for part, seed, kind in dropped:
            self.check(part, seed, kind)

    def drop_all(self) -> None:
        with self._lock:
            dropped, self._kept = self._kept, []
        for part, seed, kind in dropped:
            self.check(part, seed, kind)

    def check(self, part: Any, seed: int, kind: str) -> None:
        self.num_checked += 1
        found = numbers(part)
        if not np.all(found == seed):
            self.faults.append(f"{kind} of {seed} has {np.unique(found)[:5]}")


_keeper = Keeper(SEED)


def swap(arrived: Any, seed: int, nbytes: int) -> Any:
    """Keep some of what came, and send something of `nbytes` back."""
    _keeper.keep(arrived, seed)
    del arrived
    return [filled(seed + 1, nbytes), filled(seed + 2, nbytes).numpy()][seed % 2]


_bounced: dict[int, tuple[Any, int]] = {}
"""What each thread of the caller's sent last, if it was kept, and what is in it."""


def bounce(arrived: Any, seed: int, thread: int, keeps: bool) -> Any:
    """Send what came back, changed. Kept, it is written to once the caller has it, and calls again."""
    if thread in _bounced:
        earlier, its_seed = _bounced.pop(thread)
        _keeper.check(earlier, its_seed, "what was sent back")
        numbers(earlier)[...] = -1
    arrived += 1
    if keeps:
        _bounced[thread] = arrived, seed + 1
        _keeper.num_sent_back += 1
    return arrived


def talk(to: str, path: str, thread: int) -> None:
    chance = random.Random(f"{SEED} {path} {thread} {to}")
    low, high = RANGES[path]
    for number in range(1, ROUNDS + 1):
        seed = number * 1000 + thread * 10
        value = filled(seed, chance.randint(low, high))
        sent = [value, value.numpy()][number % 2]
        result = rpc.rpc_sync(to, swap, args=(sent, seed, chance.randint(low, high)))
        _keeper.keep(result, seed + 1 + seed % 2)
        del result  # part of it may be kept
        result = rpc.rpc_sync(to, bounce, args=(sent, seed, thread, chance.random() < 0.3))
        _keeper.keep(result, seed + 1)
        assert np.all(numbers(sent) == seed), "the callee writes to what the caller has"


def keep_and_drop(rank: int, path: str) -> dict[str, int]:
    chunks.ENCRYPTED_MIN_NBYTES, chunks.CHUNK_NBYTES, socket_link.SEND_COPY_MAX_NBYTES = (
        CHUNK_MIN_NBYTES,
        CHUNK_NBYTES,
        COPY_MAX_NBYTES,
    )
    local_link.SEND_COPY_MAX_NBYTES = COPY_MAX_NBYTES
    meet(rank, path)
    threads = [threading.Thread(target=talk, args=(f"worker{1 - rank}", path, n)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    all_gather(None)
    _keeper.drop_all()
    while _bounced:
        _keeper.check(*_bounced.popitem()[1], "what was sent back")
    assert not _keeper.faults, _keeper.faults[:10]
    expected = 3 * 2 * ROUNDS * THREADS + _keeper.num_sent_back
    assert _keeper.num_checked == expected, "what arrived, what was kept of it, and what was sent back"
    all_gather(None)
    carrier = current_agent()._carrier
    gc.collect()
    until(lambda: not carrier._transfers.buffers._loans, "all destination buffers are back")
    memory = carrier._shared_memory
    until(lambda: memory is None or memory.counts()["held"] == 0, "all slabs are back")
    placed = memory.counts()["placed"] if memory else 0
    return {SLAB: placed, CHUNKS: carrier._transfers.num_placed, "kept": _keeper.num_sent_back}


def meet(rank: int, path: str) -> None:
    """Wait until the other can be sent slabs, if that is the path."""
    other = current_agent()._peers.registry.by_rank(1 - rank)
    member = current_agent()._peers.registry.member(other.id)
    assert member is not None
    assert path != SLAB or current_agent()._carrier._endpoint.takes_files(member.incarnation)
    all_gather(None)


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
@pytest.mark.parametrize("path", [INLINE, FRAME, SLAB, CHUNKS])
def test_what_is_kept_stays_as_it_is(cluster_in_each_mode: Cluster, path: str) -> None:
    counts = cluster_in_each_mode.run(keep_and_drop, 2, args=(path,), shared_memory=path in (INLINE, SLAB))
    sent = 3 * ROUNDS * THREADS
    for count in counts:
        assert (count[SLAB] >= sent) == (path == SLAB), count
        assert (count[CHUNKS] >= sent) == (path == CHUNKS), count
        assert count[SLAB] <= sent + count["kept"], "what was sent back and not kept took a slab"


# ---- aliases ---------------------------------------------------------------------------------------------------------

_own: dict[str, Any] = {}


def make_values(nbytes: int) -> dict[str, Any]:
    numbers = filled(5, nbytes)
    return {
        "tensor": numbers,
        "array": np.full(nbytes // 8, 5),
        "parameter": torch.nn.Parameter(numbers.double()),
        "transposed": filled(5, nbytes // 64 * 64).view(-1, 8).t(),
        "conjugate": torch.full((nbytes // 8,), 5 + 5j, dtype=torch.complex64).conj(),
        "sparse": torch.sparse_coo_tensor(torch.arange(nbytes // 8)[None], numbers.clone(), check_invariants=False),
        "quantized": torch.quantize_per_tensor(torch.full((nbytes,), 5.0), 1.0, 0, torch.qint8),
    }


def memory_of(value: Any) -> Any:
    """All the memory of a value, as bytes."""
    if isinstance(value, np.ndarray):
        return value.view(np.uint8)
    if value.layout is torch.sparse_coo:
        value = value._values()
    return torch.empty(0, dtype=torch.uint8).set_(value.detach().untyped_storage()).numpy()


def overwrite(value: Any) -> None:
    memory_of(value)[...] = 0xEE


def overwrite_argument(kind: str, value: Any) -> None:
    del kind
    overwrite(value)


def give(kind: str, nbytes: int) -> Any:
    """A value that is kept here too."""
    if (kind, nbytes) not in _own:
        _own[kind, nbytes] = make_values(nbytes)[kind]
    return _own[kind, nbytes]


def is_untouched(kind: str, nbytes: int) -> bool:
    return bool(np.array_equal(memory_of(_own[kind, nbytes]), memory_of(make_values(nbytes)[kind])))


def write_to_all(rank: int, path: str) -> None:
    chunks.ENCRYPTED_MIN_NBYTES, chunks.CHUNK_NBYTES, socket_link.SEND_COPY_MAX_NBYTES = (
        CHUNK_MIN_NBYTES,
        CHUNK_NBYTES,
        COPY_MAX_NBYTES,
    )
    local_link.SEND_COPY_MAX_NBYTES = COPY_MAX_NBYTES
    meet(rank, path)
    nbytes = RANGES[path][0] + 24_000 // 8 * 8 * (path == CHUNKS)
    me, other = f"worker{rank}", f"worker{1 - rank}"
    for to in (other, me):
        for kind, value in make_values(nbytes).items():
            before = memory_of(value).copy()
            rpc.rpc_sync(to, overwrite_argument, args=(kind, value))
            assert np.array_equal(memory_of(value), before), f"{kind}: the callee writes to what the caller has"
            first, second = (rpc.rpc_sync(to, give, args=(kind, nbytes)) for _ in range(2))
            overwrite(first)
            assert np.array_equal(memory_of(second), before), f"{kind}: two results are one"
            assert rpc.rpc_sync(to, is_untouched, args=(kind, nbytes)), f"{kind}: a result is the callee's own"
    all_gather(None)


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
@pytest.mark.parametrize("path", [INLINE, FRAME, SLAB, CHUNKS])
def test_writing_to_what_arrived_shows_nowhere_else(cluster_in_each_mode: Cluster, path: str) -> None:
    cluster_in_each_mode.run(write_to_all, 2, args=(path,), shared_memory=path in (INLINE, SLAB))
