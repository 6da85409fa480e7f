"""A worker that fails is reported by its own error: the others learn of it only when its process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

LIMIT_S = 200

SLOW_TO_END = """
import sys, time
import zrpc as rpc
from pathlib import Path

rank, init_method, done = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

class Slow:
    def __del__(self, sleep=time.sleep, touch=done.touch):
        sleep(2)
        touch()

options = rpc.RpcBackendOptions(init_method=init_method)
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
if rank == 0:
    keep = Slow()
    raise ValueError("the true cause")
try:
    rpc.shutdown()
except rpc.errors.PeerLostError:
    print("learned of it", "after" if done.exists() else "before")
"""

SPAWNED = """
import os, signal, sys
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException
import zrpc as rpc

def fail():
    raise ValueError("the true cause")

def work(rank, init_method, how):
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
    if rank == 2:
        if how == "raises":
            fail()
        elif how == "raises what was raised remotely":
            rpc.rpc_sync("worker0", fail)
        elif how == "exits":
            sys.exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        while True:
            rpc.rpc_sync("worker2", int)
    rpc.shutdown()

if __name__ == "__main__":
    try:
        mp.start_processes(work, args=tuple(sys.argv[1:3]), nprocs=3, start_method="spawn")
    except ProcessException as error:
        print(error.error_index)
"""


def run(tmp_path: Path, script: str, *args: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    return subprocess.Popen(
        [sys.executable, str(path), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
    )


def test_the_others_learn_of_a_failure_when_the_process_is_gone(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """What a failed process still does after its exit handlers comes before any other worker's error."""
    args = (cluster_in_each_mode.new_init_method(), str(tmp_path / "done"))
    workers = [run(tmp_path, SLOW_TO_END, str(rank), *args) for rank in range(2)]
    said = [worker.communicate(timeout=LIMIT_S) for worker in workers]
    assert "the true cause" in said[0][1]
    assert said[1][0] == "learned of it after\n"
    assert [worker.returncode for worker in workers] == [1, 0]


@pytest.mark.parametrize(
    ("cluster_in_each_mode", "how"),
    [
        ("file", "raises"),
        ("file", "raises what was raised remotely"),
        ("file", "exits"),
        ("file", "is killed"),
        ("broker", "raises"),
        ("broker", "is killed"),
    ],
    indirect=["cluster_in_each_mode"],
)
def test_spawn_reports_the_worker_that_failed(cluster_in_each_mode: Cluster, tmp_path: Path, how: str) -> None:
    """torch.multiprocessing.spawn names the failed worker, whether others call it or wait in their shutdown."""
    spawner = run(tmp_path, SPAWNED, cluster_in_each_mode.new_init_method(), how)
    said, errors = spawner.communicate(timeout=LIMIT_S)
    assert said == "2\n", errors
