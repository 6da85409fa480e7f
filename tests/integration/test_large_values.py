"""Large `bytes` and the like between real workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import zrpc as rpc

if TYPE_CHECKING:
    from tests.integration.harness import Cluster


def lengths(*values: Any) -> list[int]:
    return [len(value) for value in values]


def doubled(value: Any) -> Any:
    return value + value


def held(value: Any) -> dict[str, list[Any]]:
    return {"a": [value]}


def large_values_arrive(rank: int) -> None:
    if rank:
        return
    for nbytes in (0, 1 << 18, 5 << 20, 40 << 20):
        values = bytes(nbytes), bytearray(nbytes), np.zeros(nbytes, np.uint8)
        assert rpc.rpc_sync("worker1", lengths, args=values) == [nbytes] * 3
        for value in values[:2]:
            result = rpc.rpc_sync("worker1", doubled, args=(value,))
            assert type(result) is type(value)
            assert result == value + value
        assert rpc.remote("worker1", held, args=(values[0],)).to_here() == {"a": [values[0]]}


def test_large_bytes_arrive_in_each_mode(cluster_in_each_mode: Cluster) -> None:
    """As arguments, as results and behind references."""
    cluster_in_each_mode.run(large_values_arrive, 2)
