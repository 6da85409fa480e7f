"""Workers are killed with large tensors on their way, and nothing of the shared memory is left behind.

Two workers live through it all. One after the other, a third joins them, exchanges tensors with both, in both
directions and on several threads, and is killed at a random moment. After each kill the two go on working, every slab
that there still is can be used again, and nothing else has been left: files, mapped memory, threads.

    ZRPC_KILLS=200 pytest tests/integration/test_slab_leaks.py     the long run; `-s` shows every twentieth kill
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from tests.integration import harness
from tests.integration.harness import is_member
from tests.waiting import until
from zrpc import errors
from zrpc.agent.current import current_agent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tests.integration.harness import Cluster
    from zrpc.transport.shared_memory import SharedMemory

KILLS = int(os.environ.get("ZRPC_KILLS", "10"))
SEED = int(os.environ.get("ZRPC_SEED", "7"))
MAX_LIFE_S = 0.15
"""A worker is killed at a random moment up to this long after its first tensor came back."""
WARM_UP = 4
"""After so many kills what stays is there, but for slabs, and for what is made when it is first needed."""
ON_DEMAND = 2
"""So many more threads, files and mappings: the helper that copies and the one of the deadlines."""
PATIENCE_S = 30.0
SIZES = (70_000, 300_000, 1_000_000, 5_000_000)
THREADS = 3
SLABS_MAX = len(SIZES) * (2 * THREADS * 3 + 2)
"""Of each size: each thread that talks, here and there, sees two, and a third is on its way; and two of the work."""
SURVIVORS = ("worker0", "worker1")


def join(name: str, rank: int, method: str) -> None:
    rpc.init_rpc(name, rank=rank, world_size=None, rpc_backend_options=rpc.RpcBackendOptions(init_method=method))
    until(lambda: all(is_member(survivor) for survivor in SURVIVORS), "both survivors are there", census)


# ---- traffic ---------------------------------------------------------------------------------------------------------


def tensor_of(seed: int) -> torch.Tensor:
    return torch.full((SIZES[seed % len(SIZES)],), seed % 251, dtype=torch.uint8)


def is_intact(tensor: torch.Tensor, seed: int) -> bool:
    return torch.equal(tensor, tensor_of(seed))


_kept: list[tuple[torch.Tensor, int]] = []
"""Some of what the killed sent; their slabs outlive them."""


def exchange(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    assert is_intact(tensor, seed)
    if seed % 10 == 0:
        _kept.append((tensor, seed))
    return tensor_of(seed + 1)


def send_back(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Its slab goes back with it, but for some that are kept."""
    exchange(tensor, seed)
    return tensor


def talk(to: str, first_seed: int) -> None:
    """Exchange tensors with `to` until it is lost."""
    seed = first_seed
    while True:
        try:
            answer = rpc.rpc_sync(to, exchange, args=(tensor_of(seed), seed))
            back = rpc.rpc_sync(to, send_back, args=(tensor_of(seed), seed))
        except errors.PeerLostError:
            return
        assert is_intact(answer, seed + 1)
        assert is_intact(back, seed)
        seed += 1


def victim(rank: int, method: str, number: int, test: Connection) -> None:
    del rank
    join(f"victim{number}", 2 + number, method)
    for name in SURVIVORS:
        assert is_intact(rpc.rpc_sync(name, exchange, args=(tensor_of(1), 1)), 2)
    threads = [threading.Thread(target=talk, args=(name, n)) for name in SURVIVORS for n in range(THREADS)]
    for thread in threads:
        thread.start()
    test.send("talking")
    for thread in threads:
        thread.join()


# ---- the survivors ---------------------------------------------------------------------------------------------------


def survive(rank: int, method: str, test: Connection) -> None:
    """Do what the test says: talk to a worker that will be killed, or look around after it was."""
    torch.set_num_threads(1)  # else each handler thread that compares tensors gets one more of OpenMP's
    join(f"worker{rank}", rank, method)
    threads: list[threading.Thread] = []
    while (order := test.recv()) is not None:
        what, name = order
        if what == "talk":
            threads = [threading.Thread(target=talk, args=(name, n)) for n in range(THREADS)]
            for thread in threads:
                thread.start()
        elif what == "settle":
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive(), f"a call to {name} neither failed nor came back"
            settle()
        elif what == "work":
            other = SURVIVORS[1 - rank]
            for seed in range(len(SIZES)):
                assert is_intact(rpc.rpc_sync(other, exchange, args=(tensor_of(seed), seed)), seed + 1)
        test.send(census())
    rpc.shutdown()


def settle() -> None:
    """Let go of everything, and wait until others have too."""
    assert all(is_intact(tensor, seed) for tensor, seed in _kept), "what the dead sent has changed"
    _kept.clear()
    gc.collect()
    until(lambda: shared_memory().counts()["held"] == 0, "no slab is held", census)
    until(is_alone_with_survivors, "nothing of the dead is kept", census)


def is_alone_with_survivors() -> bool:
    """Whether this worker has mapped slabs of one other at most."""
    return len({key[0] for key in list(shared_memory()._attachments._mapped)}) <= len(SURVIVORS) - 1


def shared_memory() -> SharedMemory:
    found = current_agent()._carrier._shared_memory
    assert found is not None
    return found


def census() -> dict[str, int]:
    """What this process has of everything that could pile up."""
    links = Counter(_target(fd) for fd in Path("/proc/self/fd").iterdir())
    memory = shared_memory()
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[1].endswith("s")]
    slab_maps = sum("/memfd:zrpc-slab" in line for line in lines)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    handlers, _ = current_agent()._server.pool.counts()
    return {
        "other_fds": sum(links.values()) - links["/memfd:zrpc-slab (deleted)"],
        "slab_fds": links["/memfd:zrpc-slab (deleted)"],
        "slab_maps": slab_maps,
        "other_shared_maps": len(lines) - slab_maps,
        "attached": len(memory._attachments._mapped),
        "loans": len(memory._attachments._loans),
        "handlers": handlers,
        "other_threads": int(status["Threads"]) - handlers,
        **memory.counts(),
    }


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:  # the directory's own
        return ""


# ---- the test --------------------------------------------------------------------------------------------------------


class Survivors:
    """The two that are not killed, as the test orders them about."""

    def __init__(self, cluster: Cluster, method: str) -> None:
        self._pipes = pipes = [harness.forkserver.Pipe() for _ in SURVIVORS]
        self.orders = [ours for ours, _ in pipes]
        self.running = [
            cluster.start(survive_as, 1, args=(rank, method, theirs), init=False)
            for rank, (_, theirs) in enumerate(pipes)
        ]

    def each(self, what: str, name: str = "") -> list[dict[str, int]]:
        for pipe in self.orders:
            pipe.send((what, name))
        return [self._answer(rank) for rank in range(len(self.orders))]

    def end(self) -> None:
        for pipe in self.orders:
            pipe.send(None)
        for running in self.running:
            assert [outcome.error for outcome in running.wait(PATIENCE_S)] == [None]

    def close(self) -> None:
        for ours, theirs in self._pipes:
            ours.close()
            theirs.close()

    def _answer(self, rank: int) -> dict[str, int]:
        if not self.orders[rank].poll(2 * PATIENCE_S):
            pytest.fail(f"worker{rank} does not answer: {self.running[rank].wait(1.0)[0].error}")
        answer: dict[str, int] = self.orders[rank].recv()
        return answer


def survive_as(_: int, rank: int, method: str, test: Connection) -> None:
    survive(rank, method, test)


@pytest.mark.timeout(120 + 3 * KILLS)
@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
def test_kills_leave_nothing_behind(cluster_in_each_mode: Cluster) -> None:
    cluster, chance = cluster_in_each_mode, random.Random(SEED)
    method = cluster.new_init_method()
    seen: list[list[dict[str, int]]] = []
    with closing(Survivors(cluster, method)) as survivors:
        survivors.each("work")
        survivors.each("settle")
        for number in range(KILLS):
            live_and_die(cluster, survivors, method, number, chance.uniform(0, MAX_LIFE_S))
            survivors.each("work")
            seen.append(survivors.each("settle"))
            for count, other in zip(seen[-1], reversed(seen[-1]), strict=True):
                check(count, other)
            if number % 20 == 19:
                print(f"{number + 1} kills: {seen[-1]}")
        survivors.end()
    assert KILLS > WARM_UP + ON_DEMAND, "nothing could have grown"
    for rank in range(len(SURVIVORS)):
        grows_no_more([counts[rank] for counts in seen])


def live_and_die(cluster: Cluster, survivors: Survivors, method: str, number: int, life_s: float) -> None:
    """Let a worker come, talk to the survivors for `life_s`, and be killed."""
    ours, theirs = harness.forkserver.Pipe()
    with ours, theirs:
        running = cluster.start(victim, 1, args=(method, number, theirs), init=False)
        assert ours.poll(PATIENCE_S), f"victim{number} does not come: {running.wait(1.0)[0].error}"
        ours.recv()
        survivors.each("talk", f"victim{number}")
        time.sleep(life_s)  # it is killed at any moment
        running.kill(0)
        running.wait(1.0)
        survivors.each("settle", f"victim{number}")


def check(count: dict[str, int], other: dict[str, int]) -> None:
    """What a worker has after a kill, once both that live have let go of everything.

    How many slabs there are depends on how many were on their way at once, so not on the number of kills alone.
    """
    assert count["slab_fds"] == count["slabs"], "files are open of slabs that are in no pool"
    assert count["handlers"] <= rpc.RpcBackendOptions().num_worker_threads, "they come as they are needed, and stay"
    assert count["held"] == count["loans"] == 0, "there are slabs that cannot be used again"
    assert count["slabs"] <= SLABS_MAX, "slabs are made while others are free"
    assert count["attached"] <= other["slabs"], "slabs are kept that their owner has let go of"
    assert count["slab_maps"] <= count["slabs"] + count["attached"], "slabs are mapped that nobody uses"


def grows_no_more(counts: list[dict[str, int]]) -> None:
    for key in ("other_fds", "other_threads", "other_shared_maps"):
        most = max(count[key] for count in counts[:WARM_UP])
        late = min(count[key] for count in counts[-WARM_UP:])
        assert late <= most + ON_DEMAND, (key, [count[key] for count in counts])
