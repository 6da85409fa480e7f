"""torchrun's elastic restarts, with torchrun itself: each round is a group of its own, on the store of the last one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.integration.harness import free_port
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PROGRAM = """
import os, sys, time
import zrpc as rpc

def double(x):
    return 2 * x

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=size)
assert sum(rpc.rpc_sync(f"worker{to}", double, args=(to,)) for to in range(size)) == size * (size - 1)
line = f"restart={restart} rank={rank} size={size}\\n"
with open(sys.argv[1], "a") as file:
    file.write("met " + line)
if sys.argv[2] == "fail" and restart < 2 and rank == size - 1:
    os._exit(3)
while sys.argv[2] == "shrink" and size == 4:
    for to in range(size):
        rpc.rpc_sync(f"worker{to}", double, args=(1,))
    time.sleep(0.05)
rpc.shutdown()
with open(sys.argv[1], "a") as file:
    file.write("end " + line)
"""


def program(directory: Path) -> str:
    path = directory / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return os.fspath(path)


@pytest.mark.parametrize("way", ["env", "file"])
def test_workers_that_torchrun_starts_again_meet_again(tmp_path: Path, way: str) -> None:
    """A worker fails twice: all are started again, as another group on torchrun's store, or in the same file."""
    log = tmp_path / "log"
    environment = {**os.environ, "ZRPC_INIT_METHOD": f"file://{tmp_path}/store"} if way == "file" else dict(os.environ)
    options = ["--nnodes", "1", "--nproc-per-node", "3", "--max-restarts", "2", "--monitor-interval", "0.1"]
    command = [*TORCHRUN, *options, "--master-port", str(free_port()), program(tmp_path), os.fspath(log), "fail"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = log.read_text().splitlines()
    for restart in range(3):
        assert f"met restart={restart} rank=2 size=3" in lines
    assert sorted(line for line in lines if line.startswith("end")) == [
        f"end restart=2 rank={rank} size=3" for rank in range(3)
    ]


def test_a_group_of_torchrun_shrinks(tmp_path: Path) -> None:
    """One of four nodes is killed: the other three meet again as a group of three.

    Their workers fail, so each node counts a restart. One that is started again because another node waits counts none,
    and would look for the others under another count: nodes that look at their workers less often see the failure.
    """
    log = tmp_path / "log"
    endpoint = f"127.0.0.1:{free_port()}"
    timing = "join_timeout=100,last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=4"
    options = [
        "--nnodes", "3:4", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "shrink", "--rdzv-conf", timing,
    ]  # fmt: skip
    command = [*TORCHRUN, *options, program(tmp_path), os.fspath(log), "shrink"]
    output = [(tmp_path / f"node{number}").open("w") for number in range(4)]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for number, file in enumerate(output):
            nodes.append(subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True))
            if number == 0:
                time.sleep(1)  # it hosts the rendezvous, and is not the one that is killed
        until(lambda: log.exists() and log.read_text().count("size=4") == 4, "four have met", within_s=90)
        lost = [psutil.Process(nodes[3].pid), *psutil.Process(nodes[3].pid).children(recursive=True)]
        for process in lost:
            process.kill()
        for node in nodes[:3]:
            assert node.wait(120) == 0, (tmp_path / "node0").read_text()[-3000:]
    finally:
        for node in nodes:
            if node.poll() is None:
                for process in [*psutil.Process(node.pid).children(recursive=True), node]:
                    process.kill()
                node.wait()
        for file in output:
            file.close()
    ended = sorted(line.partition("rank")[2] for line in log.read_text().splitlines() if line.startswith("end"))
    assert ended == [f"={rank} size=3" for rank in range(3)]
