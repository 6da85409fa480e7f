"""Workers of static groups that drain: from within, for a command cannot be a member."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from tests.integration.test_ending import Lines, logged
from tests.waiting import until
from zrpc.errors import DrainingError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

COMMAND = [sys.executable, "-c", "from zrpc.cli.main import main; main()", "drain"]


def made() -> str:
    return "made"


def drain_command(method: str, *names: str) -> list[subprocess.CompletedProcess[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return [
        subprocess.run(
            [*COMMAND, "--init-method", method, name], env=environment, capture_output=True, text=True, timeout=60,
            check=False,
        )
        for name in names
    ]  # fmt: skip


def drained(rank: int, method: str) -> list[str]:
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    kept: Lines = logged()
    if rank == 0:
        (done,) = drain_command(method, "worker1")
        held = rpc.remote("worker1", made)
        assert held.to_here() == "made"
        assert rpc.rpc_sync("worker1", rpc.drain, args=(0.1,)) is False, "its own call runs"
        with pytest.raises(DrainingError, match="did not run"):
            rpc.rpc_sync("worker1", made)
        assert held.to_here() == "made"
        assert rpc.get_worker_info("worker1").id == 1
        until(lambda: held.confirmed_by_owner(), "it is counted")
        kept.lines.append(f"{done.returncode} {done.stderr}")
    rpc.shutdown()
    return kept.lines


def test_a_worker_of_a_static_group_drains_from_within_and_leaves_at_its_end(cluster_in_each_mode: Cluster) -> None:
    """It names the RRefs that others hold, and shuts down with them. The command says that it cannot, and what can."""
    here, there = cluster_in_each_mode.run(drained, 2, args=(cluster_in_each_mode.new_init_method(),), init=False)
    assert any("has drained, and is to stay" in line and ") by worker0" in line for line in there), there
    command = " ".join(here[-1].split())
    assert command.startswith("1 zrpc drain: "), command
    assert "In a static group drain worker1 from within: call zrpc.drain() in its program" in command
