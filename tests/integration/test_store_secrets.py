"""Starting with the secret of the group, with another, and with none; the store is as open as it ever was."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import pytest
import torch
import torch.distributed as dist

import zrpc as rpc
from zrpc import errors
from zrpc.membership.tcp_store import open_tcp_store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

LIMIT_S = 120.0
OURS = {"ZRPC_SECRET": "the secret of this very group"}
OTHERS = {"ZRPC_SECRET": "the secret of quite another one"}
NONE = {"ZRPC_INSECURE": "1"}
RPC_TIMEOUT_S = 600

over_stores = pytest.mark.parametrize("cluster_in_each_mode", ["file", "tcp"], indirect=True)


def bare_store(init_method: str) -> dist.Store:
    """The store of a group, as everybody can open it."""
    url = urlparse(init_method)
    if url.scheme == "file":
        return dist.FileStore(url.path, -1)
    assert url.hostname is not None
    assert url.port is not None
    return open_tcp_store(url.hostname, url.port, is_host=False, timeout_s=LIMIT_S)


def wait_for(store: dist.Store, key: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not store.check([f"zrpc/0/{key}"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a store sends no event


def join_in_turn(rank: int, init_method: str, told: list[dict[str, str]]) -> str:
    """Rank 1 comes when rank 0 has written to the store; what it is refused with."""
    del os.environ["ZRPC_SECRET"]  # that of all tests
    os.environ.update(told[rank])
    if rank:
        wait_for(bare_store(init_method), "kind")
    options = rpc.RpcBackendOptions(init_method=init_method, rpc_timeout=RPC_TIMEOUT_S)
    with pytest.raises(errors.RefusedError) as caught:
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    return str(caught.value)


def refused_second(cluster: Cluster, first: dict[str, str], second: dict[str, str]) -> str:
    """What the second worker says, long before the time limit of 10 minutes; the first one goes on waiting."""
    running = cluster.start(join_in_turn, 2, args=(method := cluster.new_init_method(), [first, second]), init=False)
    running.processes[1].join(LIMIT_S)
    assert running.processes[0].is_alive(), method
    running.kill(0)
    said: Any = running.wait(LIMIT_S)[1]
    assert said.error is None, said.error
    assert not any(secret in said.result for secret in (*OURS.values(), *OTHERS.values()))
    return str(said.result)


@over_stores
def test_another_secret_ends_the_start_with_words_on_where_it_is_from(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(OTHERS["ZRPC_SECRET"])
    file.chmod(0o600)
    said = refused_second(cluster_in_each_mode, OURS, {"ZRPC_SECRET_FILE": str(file)})
    assert f"has another secret than this one, whose secret is from ZRPC_SECRET_FILE ({file}): give all workers" in said


@over_stores
def test_a_worker_without_a_secret_is_told_that_the_group_has_one(cluster_in_each_mode: Cluster) -> None:
    said = refused_second(cluster_in_each_mode, OURS, NONE)
    assert "the workers of this group have a secret, and this one has none" in said


@over_stores
def test_a_worker_with_a_secret_is_told_that_the_group_has_none(cluster_in_each_mode: Cluster) -> None:
    said = refused_second(cluster_in_each_mode, NONE, OURS)
    assert "the record 'kind' in the store of this group has no authentication code" in said


def join_beside_a_stranger(rank: int, init_method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method, rpc_timeout=RPC_TIMEOUT_S)
    with pytest.raises(errors.ZrpcError) as caught:
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
    return str(caught.value)


@over_stores
def test_a_record_that_a_stranger_writes_ends_the_start_of_all(cluster_in_each_mode: Cluster) -> None:
    """They would otherwise have met it as rank 2."""
    method = cluster_in_each_mode.new_init_method()
    running = cluster_in_each_mode.start(join_beside_a_stranger, 2, args=(method,), init=False)
    store = bare_store(method)
    wait_for(store, "member/1")
    store.set("zrpc/0/member/2", store.get("zrpc/0/member/1"))
    for outcome in running.wait(LIMIT_S):
        assert outcome.error is None, outcome.error
        assert "the record 'member/2' in the store of this group is not as a worker of this run wrote it" in str(
            outcome.result
        )


def groups_one_after_the_other(rank: int, init_method: str) -> list[int]:
    """A process group of torch uses the same store meanwhile."""
    url = urlparse(init_method)
    os.environ.update(MASTER_ADDR=str(url.hostname), MASTER_PORT=str(url.port))
    init_method, found = "env://", []
    for _ in range(2):
        options = rpc.RpcBackendOptions(init_method=init_method)
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=3)
        total = torch.tensor([rpc.rpc_sync(f"worker{(rank + 1) % 3}", pow, args=(2, rank))])
        dist.all_reduce(total)
        found.append(int(total))
        rpc.shutdown()
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("cluster_in_each_mode", ["tcp"], indirect=True)
def test_a_process_group_and_groups_of_zrpc_share_a_store(cluster_in_each_mode: Cluster) -> None:
    """On the same port; groups of zrpc come one after the other."""
    args = (cluster_in_each_mode.new_init_method(),)
    assert cluster_in_each_mode.run(groups_one_after_the_other, 3, args=args, init=False) == [[7, 7]] * 3
