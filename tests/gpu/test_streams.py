"""Random producers and consumers on several streams and threads: every tensor arrives bit by bit as its stream made it.

The device is kept busy between kernels, so that a copy that does not wait reads what was there before.
"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.gpu.maps import BOTH, DEVICE, TIMEOUT_S

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

ROUNDS = 1000
THREADS = 4
SIZES = [1, 1000, 50_000, 300_000, 3_000_000]
UNDER_WAY_MAX = 6
BUSY_CYCLES = 3_000_000


def scale(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Runs on the callee, on streams of its own."""
    torch.cuda._sleep(random.randrange(BUSY_CYCLES))
    return x * factor


class Client:
    """One thread's calls.

    Attributes:
        wrong: how many elements were not what they should be.
        seen: how many tensors were looked at.
        error: what ended the thread.
    """

    def __init__(self, seed: int, rounds: int) -> None:
        self._random = random.Random(seed)
        self._rounds = rounds
        self._streams = [torch.cuda.Stream(DEVICE) for _ in range(3)]
        self._under_way: list[tuple[Any, int, int, int]] = []
        self.wrong = 0
        self.seen = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number in range(self._rounds):
                self._produce(number)
                while len(self._under_way) > self._random.randrange(UNDER_WAY_MAX):
                    self._consume(self._under_way.pop(self._random.randrange(len(self._under_way))))
            for one in self._under_way:
                self._consume(one)
        except BaseException as error:
            self.error = error

    def _produce(self, number: int) -> None:
        size, factor = self._random.choice(SIZES), self._random.randrange(1, 100)
        with torch.cuda.stream(self._random.choice(self._streams)):
            torch.cuda._sleep(self._random.randrange(BUSY_CYCLES))
            tensor = made(size, number)
            if self._random.random() < 0.3:
                answer: Any = rpc.rpc_sync("worker1", scale, args=(tensor, factor))
            elif self._random.random() < 0.3:
                answer = rpc.remote("worker1", scale, args=(tensor, factor))
            else:
                answer = rpc.rpc_async("worker1", scale, args=(tensor, factor))
            if isinstance(answer, torch.Tensor):
                self._compare(answer, size, number, factor)
            else:
                self._under_way.append((answer, size, number, factor))

    def _consume(self, under_way: tuple[Any, int, int, int]) -> None:
        answer, *expected = under_way
        with torch.cuda.stream(self._random.choice(self._streams)):
            got = answer.to_here() if isinstance(answer, rpc.RRef) else answer.wait()
            self._compare(got, *expected)

    def _compare(self, got: torch.Tensor, size: int, number: int, factor: int) -> None:
        assert got.device == torch.device(DEVICE)
        self.wrong += int((got != made(size, number) * factor).sum().item())
        self.seen += 1


def made(size: int, number: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32, device=DEVICE) + number


def run_clients(rank: int) -> tuple[int, int]:
    if rank != 0:
        return 0, 0
    clients = [Client(seed, ROUNDS // THREADS) for seed in range(THREADS)]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [client.error for client in clients if client.error is not None]
    if errors:
        raise errors[0]
    return sum(client.seen for client in clients), sum(client.wrong for client in clients)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared-memory", "sockets"])
def test_every_tensor_is_what_its_stream_made(cluster: Cluster, shared_memory: bool) -> None:
    results = cluster.run(
        run_clients, device_maps=BOTH, shared_memory=shared_memory, num_worker_threads=8, timeout_s=TIMEOUT_S
    )
    assert results[0] == (ROUNDS, 0)
