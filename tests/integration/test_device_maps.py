"""Device maps that do not fit end `init_rpc` on every worker, with the same words; no GPU is needed for that."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from zrpc.agent.current import is_agent_set
from zrpc.errors import NotInitializedError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

WORLD_SIZE = 2


def fails_to_start(rank: int, init_method: str, device_map: dict[str, str]) -> str:
    """Start with a map for the other worker; the error."""
    options = rpc.RpcBackendOptions(init_method=init_method)
    options.set_device_map("worker1", device_map)
    with pytest.raises(ValueError, match="Node worker") as caught:
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    assert not is_agent_set()
    os.environ.pop("RANK")
    with pytest.raises(NotInitializedError):
        rpc.rpc_sync("worker1", torch.ones, args=(1,))
    return str(caught.value)


@pytest.mark.parametrize(
    ("device_map", "text"),
    [
        ({"cuda:99": "cuda:0"}, "Node worker0 has source devices with invalid indices in its device map for worker1"),
        ({"cpu": "cuda:99"}, "Node worker0 has target devices with invalid indices in its device map for worker1"),
    ],
)
def test_every_worker_says_what_is_wrong(cluster_in_each_mode: Cluster, device_map: dict[str, str], text: str) -> None:
    cluster = cluster_in_each_mode
    init_method = cluster.new_init_method()
    errors = cluster.run(fails_to_start, WORLD_SIZE, args=(init_method, device_map), init=False)
    assert len(errors) == WORLD_SIZE
    for error in errors:
        assert error.startswith(text)


def returns_what_it_got(rank: int) -> torch.Tensor:
    other = f"worker{1 - rank}"
    return rpc.rpc_sync(other, torch.add, args=(torch.ones(3), rank))


def test_maps_of_the_cpu_need_no_device(cluster: Cluster) -> None:
    maps = {"worker0": {"cpu": "cpu"}, "worker1": {"cpu": "cpu"}}
    results = cluster.run(returns_what_it_got, WORLD_SIZE, device_maps=maps)
    assert [result.tolist() for result in results] == [[1.0] * 3, [2.0] * 3]
