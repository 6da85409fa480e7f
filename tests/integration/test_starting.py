"""Starting a group that does not become complete, or that this process is told to leave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import zrpc as rpc
from tests.integration.harness import free_port
from zrpc import errors

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

LIMIT_S = 200

WAITING = """
import signal, sys
import zrpc as rpc
import zrpc.membership.broker, zrpc.transport.brokered

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
options = rpc.RpcBackendOptions(init_method=sys.argv[2], rpc_timeout=600)
try:
    print("begins", flush=True)
    rpc.init_rpc("worker" + sys.argv[1], rank=int(sys.argv[1]), world_size=3, rpc_backend_options=options)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGINT, (0,)), (signal.SIGINT, (1,)), (signal.SIGINT, (0, 1)), (signal.SIGTERM, (0, 1))],
)
def test_a_signal_ends_a_waiting_start(
    cluster_in_each_mode: Cluster, number: signal.Signals, ranks: tuple[int, ...]
) -> None:
    """Whether the store's host is there or not, and on it: long before the time limit of 10 minutes."""
    method = cluster_in_each_mode.new_init_method()
    command = [sys.executable, "-c", WAITING]
    workers = [
        subprocess.Popen([*command, str(rank), method], stdout=subprocess.PIPE, text=True, env={**os.environ})
        for rank in ranks
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begins\n"
    for worker in workers:
        worker.send_signal(number)
    assert [worker.communicate(timeout=LIMIT_S)[0] for worker in workers] == ["stopped\n"] * len(workers)
    assert [worker.returncode for worker in workers] == [0] * len(workers)


def test_a_signal_ends_a_start_at_a_store_that_gives_no_answer() -> None:
    """What listens has accepted the worker and says nothing, as a server does that waits for a name server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        method = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-c", WAITING, "1", method]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1)  # it has asked, and waits for the answer
            worker.send_signal(signal.SIGINT)
            assert worker.communicate(timeout=LIMIT_S)[0] == "begins\nstopped\n"


def start_in_vain(rank: int, init_method: str, ranks: list[int], world_size: int) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method, rpc_timeout=3)
    with pytest.raises(errors.ZrpcError) as caught:
        rpc.init_rpc(f"worker{rank}", rank=ranks[rank], world_size=world_size, rpc_backend_options=options)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "tcp"], indirect=True)
@pytest.mark.parametrize("ranks", [[0, 1], [0, 3], [0]])
def test_the_error_of_an_incomplete_start_names_the_missing_ranks(
    cluster_in_each_mode: Cluster, ranks: list[int]
) -> None:
    """All that came say the same, rank 0 too, and name no other rank."""
    cluster = cluster_in_each_mode
    said = cluster.run(start_in_vain, len(ranks), args=(cluster.new_init_method(), ranks, 4), init=False)
    missing = ", ".join(str(rank) for rank in range(4) if rank not in ranks)
    assert len(set(said)) == 1, said
    assert said[0].startswith(f"RendezvousError: rank(s) {missing} did not join within 3 s")


def test_a_store_whose_host_is_missing_is_named_with_its_address(cluster: Cluster) -> None:
    """Rank 0 did not come, and so nobody can know who else did: what the system says is passed on."""
    port = free_port()
    (said,) = cluster.run(start_in_vain, 1, args=(f"tcp://127.0.0.1:{port}", [1], 2), init=False)
    assert f"at 127.0.0.1:{port}, hosted by rank 0, cannot be reached within 3 s: [Errno 111]" in said


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "tcp"], indirect=True)
@pytest.mark.parametrize("twice", [0, 1])
def test_two_processes_with_one_rank_are_told_that(cluster_in_each_mode: Cluster, twice: int) -> None:
    """The second one is refused; the others learn of it when their time is over."""
    cluster, ranks = cluster_in_each_mode, [twice, twice, 1 - twice]
    said = cluster.run(start_in_vain, 3, args=(cluster.new_init_method(), ranks, 3), init=False)
    assert sum(f"RefusedError: rank {twice} is taken" in text for text in said) == 1, said
    assert sum("rank(s) 2 did not join" in text for text in said) == 2, said


def test_a_port_that_is_taken_is_said_as_the_system_says_it(cluster: Cluster) -> None:
    """What listens there is not the store of this group, and nothing is guessed of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        method = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        (said,) = cluster.run(start_in_vain, 1, args=(method, [0], 2), init=False)
    assert "rank 0 cannot host the store of its group" in said
    assert "EADDRINUSE" in said


def test_a_file_that_is_none_is_said_as_the_system_says_it(cluster: Cluster, tmp_path: Path) -> None:
    """No address and no rank 0 is spoken of where there is only a file."""
    (said,) = cluster.run(start_in_vain, 1, args=(f"file://{tmp_path}", [0], 2), init=False)
    assert "directory" in said
    assert "host" not in said
