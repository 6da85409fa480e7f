"""The host of a worker vanishes: its link goes down, and nothing is said. In network namespaces, where permitted."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.errors import PeerLostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.harness import Cluster

NOTICED_S = 12.0
"""The promise is 5 s. A machine that is busy with other tests may take longer; what is not noticed takes minutes."""
CLONE_NEWNET = 0x40000000
"""Python has no name for it before 3.12."""
HOSTS = ("a", "b")


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between them: 10.77.0.1 and 10.77.0.2."""
    prefix = f"zrpc{os.getpid()}"
    names = [f"{prefix}{host}" for host in HOSTS]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "v0")
            for device in ("lo", "v0"):
                _ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network namespaces are not permitted here: {error}")
    yield names[0], names[1]
    for name in names:
        _ip("netns", "del", name, check=False)


def _enter(host: str) -> None:
    descriptor = os.open(f"/run/netns/{host}", os.O_RDONLY)
    assert ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    os.close(descriptor)


def echo(x: torch.Tensor) -> torch.Tensor:
    return x


def work(rank: int, hosts: tuple[str, str], method: str, load: str, over: str) -> float:
    """Rank 0 waits for the loss of rank 1; after how many seconds it noticed."""
    _enter(hosts[rank])
    options = rpc.RpcBackendOptions(init_method=method, bind=f"tcp://10.77.0.{rank + 1}:0", shared_memory=False)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 1:
        until(Path(over).exists, "it is over", within_s=120)
        rpc.shutdown(graceful=False)
        return 0.0
    lost: list[float] = []
    agent = current_agent()
    agent.on_peer_lost(lambda _worker, _reason: lost.append(time.monotonic()))
    if load != "unused":
        assert rpc.rpc_sync("worker1", abs, args=(-1,)) == 1
    if load == "idle":
        time.sleep(3)  # until nothing but probes goes over the link
    x = torch.ones(8 << 20 if load == "large" else 8)
    futures = [rpc.rpc_async("worker1", echo, args=(x,), timeout=0) for _ in range(4) if load in ("small", "large")]
    began = time.monotonic()
    _ip("-n", hosts[0 if load == "cut here" else 1], "link", "set", "v0", "down")
    if load == "idle":
        until(lambda: lost, "the loss is noticed", within_s=100)
    else:
        futures.append(rpc.rpc_async("worker1", abs, args=(-1,), timeout=0))
    for future in futures[-1:]:
        with pytest.raises(PeerLostError, match=r"is off|is cut"):
            future.wait()
    took_s = time.monotonic() - began
    Path(over).touch()
    rpc.shutdown(graceful=False)
    return took_s


@pytest.mark.parametrize("load", ["idle", "small", "large", "cut here", "unused"])
def test_a_host_that_vanishes_is_noticed(cluster: Cluster, hosts: tuple[str, str], load: str, tmp_path: Path) -> None:
    """Whether the link is idle or busy, was never used, or is cut on this side, the worker is lost in seconds."""
    over = os.fspath(tmp_path / "over")
    running = cluster.start(work, 2, args=(hosts, cluster.new_init_method(), load, over), init=False)
    first, second = running.wait(120.0)
    assert first.error is None, first.error
    assert second.error is None, second.error
    print(f"{load}: noticed after {first.result:.2f} s")
    assert first.result < NOTICED_S
