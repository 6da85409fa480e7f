"""torchrun's elastic restarts, with torchrun itself: each round is a group of its own, on the store of the last one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import psutil
import pytest

import zrpc as rpc
from tests.integration.harness import free_port
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.harness import Cluster

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

    A node whose worker has failed counts a restart, and one that starts its worker again because another node waits
    counts none. Nodes that look at their workers often differ so; all meet.
    """
    log = tmp_path / "log"
    with nodes_of(tmp_path, "3:4", "shrink") as nodes:
        for _ in range(4):
            nodes.start()
        until(lambda: log.exists() and log.read_text().count("size=4") == 4, "four have met", within_s=90)
        nodes.kill(3)
        nodes.await_end(0, 1, 2)
    ended = sorted(line.partition("rank")[2] for line in log.read_text().splitlines() if line.startswith("end"))
    assert ended == [f"={rank} size=3" for rank in range(3)]


def meet_in_rounds(rank: int, method: str, number: int) -> None:
    os.environ.update(TORCHELASTIC_RUN_ID="rounds", TORCHELASTIC_RESTART_COUNT=str(rank * number))
    rpc.init_rpc(
        f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=rpc.RpcBackendOptions(init_method=method)
    )
    assert [rpc.rpc_sync(to, max, args=(to, 0)) for to in range(3)] == [0, 1, 2]
    rpc.shutdown()


def test_nodes_that_count_restarts_differently_meet(cluster: Cluster) -> None:
    """In one round after the other over one store: torchrun's nodes count failures of their own workers alone."""
    method = cluster.new_init_method()
    for number in range(1, 4):
        cluster.run(meet_in_rounds, 3, args=(method, number), init=False)


class Nodes:
    """Nodes of torchrun on this machine, each with one worker."""

    def __init__(self, directory: Path, command: list[str]) -> None:
        self._directory = directory
        self._command = command
        self._files: list[IO[str]] = []
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """One more. The first one hosts the rendezvous."""
        file = (self._directory / f"node{len(self._nodes)}").open("w")
        self._files.append(file)
        self._nodes.append(subprocess.Popen(self._command, stdout=file, stderr=file, start_new_session=True))
        if len(self._nodes) == 1:
            time.sleep(1)

    def kill(self, number: int) -> None:
        """It is gone, and its worker."""
        node = self._nodes[number]
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
            process.kill()

    def await_end(self, *numbers: int) -> None:
        """Wait until these have ended well."""
        for number in numbers:
            assert self._nodes[number].wait(120) == 0, (self._directory / f"node{number}").read_text()[-3000:]

    def close(self) -> None:
        """End what is left."""
        for number, node in enumerate(self._nodes):
            if node.poll() is None:
                self.kill(number)
            node.wait()
        for file in self._files:
            file.close()


@contextmanager
def nodes_of(directory: Path, counts: str, what: str) -> Iterator[Nodes]:
    """Nodes, as many as `counts` says, that run `PROGRAM`."""
    timing = "join_timeout=100,last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=4"
    options = [
        "--nnodes", counts, "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", what,
        "--rdzv-conf", timing,
    ]  # fmt: skip
    nodes = Nodes(directory, [*TORCHRUN, *options, program(directory), os.fspath(directory / "log"), what])
    try:
        yield nodes
    finally:
        nodes.close()
