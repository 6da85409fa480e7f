"""Workers in containers of one host, as far as namespaces make one, share what their socket directory lets them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_S = 120.0
SCRIPT = """
import sys
import torch
import zrpc as rpc

def count_shared(x):
    with open("/proc/self/maps") as maps:
        return sum("memfd:zrpc" in line for line in maps), int(x.sum())

if __name__ == "__main__":
    rank, method = int(sys.argv[1]), sys.argv[2]
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        print(*rpc.rpc_sync("worker1", count_shared, args=(torch.ones(1_000_000),)))
    rpc.shutdown()
"""


@cache
def can_unshare(*namespaces: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", *namespaces, "true"], capture_output=True, timeout=LIMIT_S).returncode == 0


def run_two(tmp_path: Path, namespaces: list[str], directories: tuple[str, str]) -> tuple[int, int]:
    """How many pieces of shared memory a callee sees that runs in namespaces of its own, and the sum that it got."""
    script, method = tmp_path / "worker.py", f"file://{tmp_path}/meet"
    script.write_text(SCRIPT)
    commands = [[sys.executable, str(script), "0", method], [*namespaces, sys.executable, str(script), "1", method]]
    workers = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"ZRPC_LOCAL_DIR": str(tmp_path / directory)},
        )
        for command, directory in zip(commands, directories, strict=True)
    ]  # fmt: skip
    try:
        told = [worker.communicate(timeout=LIMIT_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], [errors for _, errors in told]
    count, total = told[0][0].split()
    return int(count), int(total)


@pytest.mark.parametrize(
    "kinds", [["--pid", "--fork", "--mount-proc"], ["--net"], ["--ipc", "--uts"]], ids=lambda k: k[0]
)
def test_containers_that_share_the_directory_share_memory(tmp_path: Path, kinds: list[str]) -> None:
    """Though they share no process ids, or not even the network."""
    namespaces = ["unshare", *kinds]
    if not can_unshare(*kinds):
        pytest.skip("this user may not make such namespaces")
    count, total = run_two(tmp_path, namespaces, ("links", "links"))
    assert count > 0
    assert total == 1_000_000


def test_workers_with_directories_of_their_own_talk_over_tcp(tmp_path: Path) -> None:
    assert run_two(tmp_path, [], ("one", "other")) == (0, 1_000_000)
