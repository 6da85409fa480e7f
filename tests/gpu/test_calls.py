"""Calls with tensors on a device: maps, errors, the pool, and when the sender may write again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.gpu.maps import BOTH, DEVICE, TIMEOUT_S
from zrpc.agent.current import current_agent
from zrpc.errors import DeviceError, SerializationError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster


def where(x: torch.Tensor) -> str:
    return str(x.device)


def echo(x: Any) -> Any:
    return x


def on_device(size: int) -> torch.Tensor:
    return torch.ones(size, device=DEVICE)


# ---- maps ----------------------------------------------------------------------------------------------------------


def go_by_the_map(rank: int) -> list[str]:
    if rank:
        return []
    x, cpu = torch.ones(3, device=DEVICE), torch.ones(3)
    return [
        rpc.rpc_sync("worker1", where, args=(x,)),
        rpc.rpc_sync("worker1", where, args=(cpu,)),
        where(rpc.rpc_sync("worker1", torch.add, args=(x, 1))),
        where(rpc.rpc_sync("worker0", torch.add, args=(x, 1))),
        where(rpc.remote("worker1", on_device, args=(3,)).to_here()),
    ]


def test_tensors_go_by_the_map_and_back(cluster: Cluster) -> None:
    assert cluster.run(go_by_the_map, device_maps=BOTH)[0] == [DEVICE, "cpu", DEVICE, DEVICE, DEVICE]


def cross(rank: int) -> list[str]:
    if rank:
        return []
    return [
        rpc.rpc_sync("worker1", where, args=(torch.ones(3),)),
        where(rpc.rpc_sync("worker1", echo, args=(torch.ones(3),))),
        rpc.rpc_sync("worker1", where, args=(torch.ones(3, device=DEVICE),)),
        where(rpc.rpc_sync("worker1", echo, args=(torch.ones(3, device=DEVICE),))),
    ]


def test_maps_may_cross_from_the_cpu_to_a_device(cluster: Cluster) -> None:
    crossed = {"worker1": {"cpu": DEVICE, DEVICE: "cpu"}}
    assert cluster.run(cross, device_maps=crossed)[0] == [DEVICE, "cpu", "cpu", DEVICE]


def send_all_kinds(rank: int) -> int:
    """Layouts, dtypes, views and storages, there and back; how many."""
    if rank:
        return 0
    base = torch.randn(40, 50, device=DEVICE)
    kinds = [
        base, base.t(), base[:, 3], base[2:4], base.expand(3, 40, 50), torch.tensor(2.5, device=DEVICE),
        torch.empty(0, 3, device=DEVICE), base.bfloat16(), base.to(torch.complex64).conj(), torch._neg_view(base),
        torch.eye(5, device=DEVICE).to_sparse(), torch.nn.Parameter(base.clone()), base > 0,
    ]  # fmt: skip
    for tensor in kinds:
        back = rpc.rpc_sync("worker1", echo, args=(tensor,))
        assert (back.device, back.dtype, back.shape) == (tensor.device, tensor.dtype, tensor.shape)
        assert torch.equal(back.to_dense() if back.is_sparse else back, tensor.to_dense())
    whole, view = rpc.rpc_sync("worker1", echo, args=((base, base[3:5]),))
    whole.zero_()
    assert not view.any(), "views of one storage stay such"
    return len(kinds)


def test_all_kinds_of_tensors_travel(cluster: Cluster) -> None:
    assert cluster.run(send_all_kinds, device_maps=BOTH)[0] == 13


# ---- errors --------------------------------------------------------------------------------------------------------


def send_without_a_map(rank: int) -> None:
    if rank:
        return
    with pytest.raises(SerializationError, match="Request device mapping is not available for destination worker1"):
        rpc.rpc_sync("worker1", echo, args=(torch.ones(3, device=DEVICE),))
    with pytest.raises(SerializationError, match="Response device mapping is not available for destination worker0"):
        rpc.rpc_sync("worker1", on_device, args=(3,))
    assert rpc.rpc_sync("worker1", echo, args=(1,)) == 1


def test_a_missing_map_is_an_error_both_ways(cluster: Cluster) -> None:
    cluster.run(send_without_a_map)


def name_a_missing_device(rank: int, init_method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method)
    options.set_device_map("worker1", {0: torch.cuda.device_count()})
    with pytest.raises(ValueError, match="target devices with invalid indices") as caught:
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    return str(caught.value)


def test_a_device_that_is_not_there_ends_init_on_every_worker(cluster: Cluster) -> None:
    results = cluster.run(name_a_missing_device, args=(cluster.new_init_method(),), init=False)
    assert all(text.startswith("Node worker0 has target devices") for text in results)


def limit_memory(megabytes: int) -> None:
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (megabytes << 20) / total), DEVICE)


def fill_the_callee(rank: int) -> None:
    if rank:
        return
    rpc.rpc_sync("worker1", limit_memory, args=(64,))
    large = torch.ones(128 << 20, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        with pytest.raises(DeviceError, match=r"134217728 bytes .* cuda:0: .*out of memory"):
            rpc.rpc_sync("worker1", where, args=(large,))
        with pytest.raises(DeviceError, match="out of memory"):
            rpc.rpc_async("worker1", where, args=(large,)).wait()
    assert torch.equal(rpc.rpc_sync("worker1", echo, args=(large[:100],)), large[:100])


def test_a_callee_without_memory_says_so_and_goes_on(cluster: Cluster) -> None:
    cluster.run(fill_the_callee, device_maps=BOTH)


# ---- the pool, and memory ------------------------------------------------------------------------------------------


def reuse_the_pool(rank: int) -> dict[str, int]:
    if rank:
        return {}
    counts = current_agent().staging.counts
    x = torch.ones(8 << 20, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        rpc.rpc_sync("worker1", echo, args=(x,))
    made = counts()["pinned_blocks_made"]
    for _ in range(50):
        rpc.rpc_sync("worker1", echo, args=(x,))
    assert counts()["pinned_blocks_made"] == made
    return counts()


def test_pinned_memory_is_used_again_and_bounded(cluster: Cluster) -> None:
    counts = cluster.run(reuse_the_pool, device_maps=BOTH, pinned_pool_nbytes=64 << 20)[0]
    assert counts["pinned_nbytes"] <= 64 << 20
    assert counts["pinned_outside_pool"] == 0
    assert counts["pinned_loans"] >= 4 * 53


def exceed_the_pool(rank: int) -> None:
    if rank:
        return
    x = torch.arange(16 << 20, dtype=torch.int32, device=DEVICE)
    futures = [rpc.rpc_async("worker1", echo, args=(x,)) for _ in range(4)]
    assert all(torch.equal(future.wait(), x) for future in futures)


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared-memory", "sockets"])
def test_transfers_larger_than_the_pool_go_through(cluster: Cluster, shared_memory: bool) -> None:
    cluster.run(
        exceed_the_pool,
        device_maps=BOTH, pinned_pool_nbytes=1 << 20, shared_memory=shared_memory, timeout_s=TIMEOUT_S,
    )  # fmt: skip


_kept: list[torch.Tensor] = []


def keep(x: torch.Tensor) -> None:
    _kept.append(x)


def count_different(expected: int) -> int:
    return sum(int((tensor != expected).sum().item()) for tensor in _kept)


def write_again(rank: int) -> int:
    if rank:
        return 0
    for size in (10, 100_000, 5 << 20):
        x = torch.full((size,), 7, dtype=torch.uint8, device=DEVICE)
        rpc.rpc_sync("worker1", keep, args=(x,))
        x.zero_()
        future = rpc.rpc_async("worker1", keep, args=(x.fill_(7),))
        future.wait()
        x.zero_()
    for _ in range(30):  # what carried them is used again
        rpc.rpc_sync("worker1", echo, args=(torch.zeros(5 << 20, dtype=torch.uint8, device=DEVICE),))
    return rpc.rpc_sync("worker1", count_different, args=(7,))


def test_the_sender_may_write_again_when_the_call_is_done(cluster: Cluster) -> None:
    assert cluster.run(write_again, device_maps=BOTH)[0] == 0


def overlap(rank: int) -> bool:
    """Whether `rpc_async` returns, and the caller's stream goes on, while the kernel before it still runs."""
    if rank:
        return True
    x = torch.ones(1000, device=DEVICE)
    rpc.rpc_sync("worker1", echo, args=(x,))
    torch.cuda._sleep(2_000_000_000)
    behind = torch.cuda.Event()
    behind.record()
    future = rpc.rpc_async("worker1", echo, args=(x,))
    returned_early = not behind.query()
    assert torch.equal(future.wait(), x)
    return returned_early


def test_an_asynchronous_call_does_not_wait_for_the_device(cluster: Cluster) -> None:
    assert all(cluster.run(overlap, device_maps=BOTH))
