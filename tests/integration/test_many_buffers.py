"""Calls with many tensors and arrays: they share memory on their way, and nothing where they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import zrpc as rpc

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

SIZES = (0, 1, 7, 500, 1024, 1025, 5_000, 16_384, 30_000, 32_768, 32_769, 300_000)
"""Elements of four bytes: from none to more than shares memory."""
_kept: list[torch.Tensor] = []


def mixed(seed: int) -> dict[str, Any]:
    made = torch.Generator().manual_seed(seed)
    tensors = {f"t{index}": torch.randn(size, generator=made) for index, size in enumerate(SIZES * 3)}
    whole = torch.randn(64, 200, generator=made)
    return {
        **tensors,
        "grad": torch.randn(9_000, generator=made, requires_grad=True),
        "half": torch.randn(3_333, generator=made).half(),
        "views": [whole[:32], whole[32:], whole.t()],
        "arrays": [np.arange(size, dtype=np.int64) + seed for size in (3, 700, 5_000)],
        "bytes": [bytes([seed]) * size for size in (10, 5_000, 70_000)],
    }


def are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(are_equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)


def check_and_return(seed: int, values: dict[str, Any]) -> dict[str, Any]:
    assert are_equal(values, mixed(seed))
    return values


def overwrite_one_by_one(seed: int, values: dict[str, Any]) -> bool:
    """Each tensor is filled in turn; whether the others stay as they are."""
    expected = mixed(seed)
    for name in (name for name in expected if name.startswith("t")):
        values[name].fill_(-1)
        expected[name].fill_(-1)
        if not are_equal(values, expected):
            return False
    values["views"][0].fill_(5)
    return bool((values["views"][2].t()[:32] == 5).all())


def keep_the_first(values: dict[str, Any]) -> int:
    _kept.append(values["t2"])
    _kept.append(values["t6"])
    return len(_kept)


def kept_sums() -> list[float]:
    sums = [float(one.sum()) for one in _kept]
    _kept.clear()
    return sums


def send_many(rank: int) -> None:
    if rank:
        return
    for seed in range(5):
        assert are_equal(rpc.rpc_sync("worker1", check_and_return, args=(seed, mixed(seed))), mixed(seed))
        assert rpc.rpc_sync("worker1", overwrite_one_by_one, args=(seed, mixed(seed)))
    sent = [mixed(seed) for seed in range(20)]
    for number, values in enumerate(sent, 1):
        assert rpc.rpc_sync("worker1", keep_the_first, args=(values,)) == 2 * number
    expected = [float(values[name].sum()) for values in sent for name in ("t2", "t6")]
    assert rpc.rpc_sync("worker1", kept_sums) == expected, "what is kept stays as it was while others are sent"


def test_many_tensors_and_arrays_arrive_as_they_were_and_share_nothing(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(send_many, 2)


def test_they_do_through_sockets_too(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(send_many, 2, shared_memory=False)
