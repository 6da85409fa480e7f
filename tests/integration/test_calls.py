"""Calls between real worker processes, in each way of finding each other."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

import zrpc as rpc
from tests.integration.harness import Cluster, free_port


class CustomError(Exception):
    """One whose constructor takes other arguments than it passes on."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Counter:
    total = 0

    def __init__(self, start: int) -> None:
        self.value = start

    def add(self, n: int) -> int:
        self.value += n
        return self.value

    @classmethod
    def add_total(cls, n: int) -> int:
        cls.total += n
        return cls.total

    @staticmethod
    def double(n: int) -> int:
        return 2 * n

    def __call__(self, n: int) -> int:
        return self.value * n


def other(rank: int) -> str:
    return f"worker{1 - rank}"


def identity(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def raise_custom() -> None:
    raise CustomError(7, "Expected error")


def countdown(n: int) -> int:
    me = rpc.get_worker_info()
    return 0 if n == 0 else 1 + rpc.rpc_sync(1 - me.id, countdown, args=(n - 1,))


@rpc.functions.async_execution
def add_there(to: str, x: torch.Tensor, y: torch.Tensor, z: int) -> torch.futures.Future[torch.Tensor]:
    return rpc.rpc_async(to, torch.add, args=(x, y)).then(lambda future: future.wait() + z)


def write_and_sum(x: torch.Tensor) -> float:
    x.fill_(2.0)
    return float(x.sum())


# ---- what the workers run --------------------------------------------------------------------------------------------


def kinds_of_functions(rank: int) -> None:
    to = other(rank)
    assert rpc.rpc_sync(to, identity, args=(1, "a"), kwargs={"b": [2]}) == ((1, "a"), {"b": [2]})
    assert rpc.rpc_sync(to, Counter.double, args=(4,)) == 8
    assert rpc.rpc_sync(to, Counter.add_total, args=(3,)) == 3
    counter = Counter(5)
    assert rpc.rpc_sync(to, counter.add, args=(2,)) == 7
    assert counter.value == 5, "the callee works on a copy"
    assert rpc.rpc_sync(to, counter, args=(3,)) == 15
    assert rpc.rpc_sync(to, min, args=(3, 1, 2)) == 1
    assert rpc.rpc_sync(to, Counter, args=(9,)).value == 9


def kinds_of_targets(rank: int) -> None:
    there = 1 - rank
    info = rpc.get_worker_info(f"worker{there}")
    assert info == rpc.WorkerInfo(f"worker{there}", there)
    for to in (there, f"worker{there}", info):
        assert rpc.rpc_sync(to, rpc.get_worker_info) == info
    me = rpc.get_worker_info()
    assert rpc.rpc_sync(me, rpc.get_worker_info) == me


def builtin_operators(rank: int) -> None:
    to, x = other(rank), torch.arange(6.0).reshape(2, 3)
    assert torch.equal(rpc.rpc_sync(to, torch.add, args=(x, 1)), x + 1)
    assert torch.equal(rpc.rpc_sync(to, torch.add, args=(x, x), kwargs={"alpha": 2}), 3 * x)
    assert torch.equal(rpc.rpc_sync(to, torch.Tensor.mul, args=(x, x)), x * x)
    assert torch.equal(rpc.rpc_sync(to, torch.ops.aten.relu, args=(-x,)), torch.relu(-x))
    assert torch.equal(rpc.rpc_sync(to, torch.ops.aten.add.Tensor, args=(x, x)), x + x)
    values, indices = rpc.rpc_sync(to, torch.max, args=(x, 1))
    assert torch.equal(values, x.max(1).values)
    assert torch.equal(indices, x.max(1).indices)
    assert rpc.rpc_sync(to, torch.zeros, args=((2, 3),), kwargs={"dtype": torch.int16}).dtype == torch.int16
    with pytest.raises(RuntimeError, match="size of tensor"):
        rpc.rpc_sync(to, torch.add, args=(torch.ones(2), torch.ones(3)))


def tensors_of_every_size(rank: int) -> None:
    to = other(rank)
    for numel in (0, 1, 1000, 5000, 100_000, 5_000_000):
        x = torch.randn(numel)
        ((y,), _) = rpc.rpc_sync(to, identity, args=(x,))
        assert torch.equal(x, y)
        before = x.clone()
        assert rpc.rpc_sync(to, write_and_sum, args=(x,)) == pytest.approx(2.0 * numel)
        assert torch.equal(x, before), "a write at the callee showed at the caller"
        y.fill_(0)
    array = np.arange(100_000).reshape(100, 1000)
    ((back,), _) = rpc.rpc_sync(to, identity, args=(array,))
    back += 1
    assert np.array_equal(back, array + 1)


def remote_exceptions(rank: int) -> None:
    with pytest.raises(CustomError, match="Expected error") as caught:
        rpc.rpc_sync(other(rank), raise_custom)
    assert caught.value.code == 7
    assert "raise_custom" in str(caught.value.__cause__), "the remote traceback is missing"
    future = rpc.rpc_async(other(rank), raise_custom)
    for _ in range(2):
        with pytest.raises(CustomError, match="Expected error"):
            future.wait()


def nested_calls(rank: int) -> None:
    assert rpc.rpc_sync(other(rank), countdown, args=(50,)) == 50


def futures(rank: int) -> None:
    to = other(rank)
    made = [rpc.rpc_async(to, torch.add, args=(torch.ones(2), n)) for n in range(20)]
    assert all(isinstance(future, torch.futures.Future) for future in made)
    for n, value in enumerate(torch.futures.wait_all(made)):
        assert torch.equal(value, torch.ones(2) + n)
    gathered = torch.futures.collect_all(made).wait()
    assert torch.equal(gathered[3].wait(), torch.full((2,), 4.0))
    chained = made[0].then(lambda f: rpc.rpc_sync(to, torch.add, args=(f.wait(), 1)))
    assert torch.equal(chained.wait(), torch.full((2,), 2.0))
    called = threading.Event()
    made[1].add_done_callback(lambda _: called.set())
    assert called.wait(10)

    async def gather() -> list[Any]:
        return await asyncio.gather(*(rpc.rpc_async(to, Counter.double, args=(n,)) for n in range(10)))

    assert asyncio.run(gather()) == [2 * n for n in range(10)]


def async_execution(rank: int) -> None:
    x = torch.ones(2)
    for to in ("worker0", "worker1"):
        result = rpc.rpc_sync(other(rank), add_there, args=(to, x, x, 3))
        assert torch.equal(result, torch.full((2,), 5.0))
    with pytest.raises(RuntimeError, match=r"must return a torch\.futures\.Future object"):
        rpc.rpc_sync(other(rank), not_a_future)


@rpc.functions.async_execution
def not_a_future() -> int:
    return 3


def many_threads(rank: int) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for n in range(50):
                assert rpc.rpc_sync(other(rank), Counter.double, args=(n,)) == 2 * n
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


EVERYTHING = (
    kinds_of_functions,
    kinds_of_targets,
    builtin_operators,
    tensors_of_every_size,
    remote_exceptions,
    nested_calls,
    futures,
    async_execution,
    many_threads,
)


def everything(rank: int) -> list[str]:
    for function in EVERYTHING:
        function(rank)
    return [function.__name__ for function in EVERYTHING]


def test_calls(cluster_in_each_mode: Cluster) -> None:
    done = [function.__name__ for function in EVERYTHING]
    assert cluster_in_each_mode.run(everything, 2, num_worker_threads=4) == [done, done]


def meet_again(rank: int) -> int:
    for generation in range(3):
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
        assert rpc.rpc_sync(1 - rank, Counter.double, args=(generation,)) == 2 * generation
        rpc.shutdown()
    return 3


def test_init_after_shutdown(cluster: Cluster) -> None:
    assert cluster.run(with_master, 2, args=(free_port(),), init=False) == [3, 3]


def with_master(rank: int, port: int) -> int:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return meet_again(rank)
