"""Tensors that go from device to device, without the host between: `cuda_ipc`. Both workers use one device."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.gpu.maps import BOTH, DEVICE, TIMEOUT_S
from tests.gpu.test_calls import count_different, echo, keep, send_all_kinds
from tests.gpu.test_streams import ROUNDS, run_clients
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.errors import PeerLostError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LARGE = 8 << 20


def ipc_counts() -> dict[str, int]:
    return {name: count for name, count in current_agent().staging.counts().items() if name.startswith("ipc_")}


def warm_up() -> None:
    """Have each side open memory of the other, and see that it could."""
    x = torch.arange(LARGE, device=DEVICE).to(torch.uint8)
    for _ in range(20):
        assert torch.equal(rpc.rpc_sync("worker1", echo, args=(x,)), x)
    for counts in (ipc_counts(), rpc.rpc_sync("worker1", ipc_counts)):
        assert counts["ipc_tensors"] >= 10, f"memory was not opened at the other side: {counts}"


def go_back_and_forth(rank: int) -> dict[str, int]:
    if rank:
        return {}
    warm_up()
    for size in (70_000, 1 << 20, LARGE):
        x = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
        for _ in range(20):
            assert torch.equal(rpc.rpc_sync("worker1", echo, args=(x,)), x)
    return ipc_counts()


def test_tensors_go_from_device_to_device(cluster: Cluster) -> None:
    counts = cluster.run(go_back_and_forth, device_maps=BOTH, cuda_ipc=True)[0]
    assert counts["ipc_tensors"] >= 60, "of 80"
    assert counts["ipc_slabs"] <= 4
    assert counts["ipc_slabs_held"] <= 1, "the last one may be copied yet"


def test_all_kinds_of_tensors_travel(cluster: Cluster) -> None:
    assert cluster.run(send_all_kinds, device_maps=BOTH, cuda_ipc=True)[0] == 13


def test_every_tensor_is_what_its_stream_made(cluster: Cluster) -> None:
    results = cluster.run(run_clients, device_maps=BOTH, cuda_ipc=True, num_worker_threads=8, timeout_s=TIMEOUT_S)
    assert results[0] == (ROUNDS, 0)


def write_again(rank: int) -> int:
    if rank:
        return 0
    warm_up()
    for size in (100_000, 5 << 20):
        x = torch.full((size,), 7, dtype=torch.uint8, device=DEVICE)
        for _ in range(3):
            rpc.rpc_sync("worker1", keep, args=(x.fill_(7),))
            x.zero_()
    for _ in range(30):  # the slabs are used again
        rpc.rpc_sync("worker1", echo, args=(torch.zeros(5 << 20, dtype=torch.uint8, device=DEVICE),))
    return rpc.rpc_sync("worker1", count_different, args=(7,))


def test_what_arrived_is_the_receivers_own(cluster: Cluster) -> None:
    assert cluster.run(write_again, device_maps=BOTH, cuda_ipc=True)[0] == 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def outlive_the_receiver(rank: int, init_method: str) -> int:
    options = rpc.RpcBackendOptions(init_method=init_method, device_maps=BOTH, cuda_ipc=True)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank:
        signal.pause()
    warm_up()
    with pytest.raises(PeerLostError):
        rpc.rpc_sync("worker1", die)
    until(lambda: not ipc_counts()["ipc_slabs"], "the slabs for the dead worker are let go of", ipc_counts)
    left = ipc_counts()["ipc_slabs_nbytes"]
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    assert torch.ones(LARGE, device=DEVICE).sum().item() == LARGE, "the device works on"
    with pytest.raises(PeerLostError):
        rpc.shutdown()
    return left + allocated // LARGE


def test_memory_that_a_killed_receiver_had_open_comes_back(cluster: Cluster) -> None:
    running = cluster.start(outlive_the_receiver, 2, args=(cluster.new_init_method(),), init=False)
    outcome: Any = running.wait(TIMEOUT_S)[0]
    assert outcome.error is None
    assert outcome.result == 0


def outlive_the_sender(rank: int, init_method: str) -> bool:
    options = rpc.RpcBackendOptions(init_method=init_method, device_maps=BOTH, cuda_ipc=True)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank:
        signal.pause()
    warm_up()
    futures = [rpc.rpc_async("worker1", echo, args=(torch.ones(LARGE, device=DEVICE),)) for _ in range(4)]
    with pytest.raises(PeerLostError):
        rpc.rpc_sync("worker1", die)
    for future in futures:
        try:
            assert future.wait().sum().item() == LARGE, "what has come is whole"
        except PeerLostError:
            continue
    torch.cuda.synchronize()
    assert torch.ones(LARGE, device=DEVICE).sum().item() == LARGE, "the device works on"
    with pytest.raises(PeerLostError):
        rpc.shutdown()
    return True


def test_a_device_outlives_the_death_of_a_sender(cluster: Cluster) -> None:
    """What CUDA does with memory of a process that has died is not documented: this is to find out."""
    running = cluster.start(outlive_the_sender, 2, args=(cluster.new_init_method(),), init=False)
    outcome: Any = running.wait(TIMEOUT_S)[0]
    assert outcome.error is None
    assert outcome.result


def allocate_in_segments(rank: int) -> int:
    """Allocate as `expandable_segments` does, which may not be exported: whatever comes of it, calls succeed."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    if rank:
        return 0
    x = torch.arange(LARGE, device=DEVICE).to(torch.uint8)
    for _ in range(5):
        assert torch.equal(rpc.rpc_sync("worker1", echo, args=(x,)), x)
    counts = ipc_counts()
    return counts["ipc_tensors"] + counts["ipc_fallbacks"]


def test_calls_succeed_whatever_the_allocator(cluster: Cluster) -> None:
    assert cluster.run(allocate_in_segments, device_maps=BOTH, cuda_ipc=True)[0] == 5
