"""Groups let in who knows their secret, whole groups of real processes: the others are told what is wrong."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq

import zrpc as rpc
from tests.integration.broker_harness import running_broker, workers
from tests.integration.harness import MODES, Cluster
from tests.waiting import until
from zrpc.errors import RefusedError, ZrpcError
from zrpc.secret import find_secret
from zrpc.transport import sockets
from zrpc.transport.credentials import Credentials
from zrpc.transport.identities import BROKER, END_NBYTES, RECEIVER, SENDER
from zrpc.wire.envelope import Envelope, encode
from zrpc.wire.messages import Leave

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECRET, OTHER = "the secret of this group", "the secret of another group"
LIMIT_S = 60.0
"""Who is refused is told long before the time limit of a start."""
WORDS = {
    "another secret": {"secret": OTHER},
    "no secret": {"insecure": True},
}


@pytest.fixture(params=MODES)
def cluster(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("ZRPC_SECRET", SECRET)  # of the broker
    started = Cluster(request.param, tmp_path)
    yield started
    started.close()


def join(rank: int, method: str, world_size: int | None, options: dict[int, dict[str, Any]], folder: Path) -> str:
    """Come in and go; what was raised. Rank 1 comes when rank 0 has."""
    if rank == 1:
        until((folder / "begun").exists, "rank 0 has begun", within_s=LIMIT_S)
    chosen = rpc.RpcBackendOptions(init_method=method, rpc_timeout=LIMIT_S, **options[rank])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if rank == 0 and world_size is not None:
                (folder / "begun").touch()
            rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=chosen)
    except ZrpcError as error:
        return f"{type(error).__name__}: {error}"
    (folder / "begun").touch()
    if rank == 0 and world_size is None:
        until((folder / "refused").exists, "rank 1 was refused", within_s=LIMIT_S)
    rpc.shutdown(graceful=world_size is not None)
    return ""


def join_second(rank: int, *args: Any) -> str:
    """The same; rank 0 stays until rank 1 has ended."""
    outcome = join(rank, *args)
    if rank == 1:
        (args[-1] / "refused").touch()
    return outcome


@pytest.mark.parametrize("what", WORDS)
def test_a_worker_without_the_secret_is_refused_and_told_what_to_do(
    cluster: Cluster, tmp_path: Path, what: str
) -> None:
    """And whoever is there already stays."""
    method = cluster.new_init_method()
    options = {0: {"secret": SECRET}, 1: WORDS[what]}
    first, second = cluster.run(join_second, 2, args=(method, None, options, tmp_path), init=False)
    assert first == ""
    assert second.startswith(RefusedError.__name__), second
    assert "secret" in second
    assert SECRET not in second
    assert OTHER not in second


@pytest.mark.parametrize("insecure", [False, True])
def test_workers_with_the_same_find_each_other(cluster: Cluster, tmp_path: Path, insecure: bool) -> None:
    method = cluster.new_init_method() if not insecure or cluster.mode != "broker" else _insecure_broker(cluster)
    options = dict.fromkeys((0, 1), {"insecure": True} if insecure else {"secret": SECRET})
    assert cluster.run(join, 2, args=(method, 2, options, tmp_path), init=False) == ["", ""]


def _insecure_broker(cluster: Cluster) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZRPC_INSECURE", "1")
        return cluster.new_init_method()


def test_a_broker_without_authentication_is_not_joined_by_workers_with_a_secret(tmp_path: Path) -> None:
    """It may be another user's, on a port where this group's broker was."""
    started = Cluster("broker", tmp_path)
    try:
        method = _insecure_broker(started)
        (outcome,) = started.run(join, 1, args=(method, 1, {0: {"secret": SECRET}}, tmp_path), init=False)
        assert outcome.startswith(RefusedError.__name__)
        assert "or none (insecure)" in outcome
    finally:
        started.close()


def test_a_member_does_not_take_the_place_of_another_at_the_broker() -> None:
    """Another process that knows the secret says that it is that worker: nobody is lost, and it gets no messages."""
    credentials = Credentials(find_secret())
    with (
        running_broker() as broker,
        workers(broker.address, "victim", "b", local=False) as (victim, b),
        sockets.make_context() as context,
        sockets.make_socket(context, zmq.DEALER, RECEIVER + victim.incarnation + b"\xff" * END_NBYTES) as receiver,
        sockets.make_socket(context, zmq.DEALER, SENDER + victim.incarnation + b"\xff" * END_NBYTES) as sender,
    ):
        sockets.connect(receiver, broker.address, credentials)
        sockets.connect(sender, broker.address, credentials)
        receiver.send(b"")
        sender.send_multipart([BROKER, *encode(Envelope(Leave(), 0))])
        assert broker.process.stderr is not None
        assert "another one waits until that is gone" in broker.process.stderr.readline()
        for _ in range(10):
            b.endpoint.send(victim.incarnation, [b"for the victim"])
        victim.seen.wait(lambda: len(victim.seen.frames) == 10)
        victim.endpoint.send(b.incarnation, [b"of the victim"])
        b.seen.wait(lambda: len(b.seen.frames) == 1)
        assert not receiver.poll(0)
        assert not any([b.seen.lost, b.seen.left, victim.seen.lost])


def serve_and_wait(rank: int, folder: Path) -> list[str]:
    """Go on calling while strangers connect."""
    from zrpc.agent.current import current_agent

    if rank == 1:
        until((folder / "over").exists, "it is over", within_s=LIMIT_S)
        return []
    address = rpc.rpc_sync("worker1", address_of_this_worker)
    threads = rpc.rpc_sync("worker1", num_threads)
    assert current_agent() is not None
    (folder / "address").write_text(address)
    until((folder / "besieged").exists, "strangers have come", within_s=LIMIT_S)
    seen = [str(rpc.rpc_sync("worker1", max, args=(number, 1))) for number in range(2, 100)]
    assert rpc.rpc_sync("worker1", num_threads) < threads + 20, "500 strangers cost no threads"
    (folder / "over").touch()
    return seen


def address_of_this_worker() -> str:
    from zrpc.agent.current import current_agent

    return str(current_agent().address)


def num_threads() -> int:
    return psutil.Process().num_threads()


BESIEGE = """
import socket, sys, time
host, port = sys.argv[1].removeprefix("tcp://").split(":")
connections = []
for number in range(500):
    sock = socket.create_connection((host, int(port)))
    if number % 2:
        sock.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03")
    connections.append(sock)
print("here", flush=True)
time.sleep(600)
"""


def test_members_go_on_while_hundreds_of_strangers_hold_connections_open(tmp_path: Path) -> None:
    """That say nothing, or half of a greeting. How long calls take then: `python -m benchmarks.flood`."""
    started = Cluster("file", tmp_path)
    try:
        running = started.start(serve_and_wait, 2, args=(tmp_path,), shared_memory=False)
        until(lambda: (tmp_path / "address").exists() and (tmp_path / "address").read_text(), "it has begun")
        address = (tmp_path / "address").read_text()
        with subprocess.Popen([sys.executable, "-c", BESIEGE, address], stdout=subprocess.PIPE, text=True) as strangers:
            assert strangers.stdout is not None
            assert strangers.stdout.readline() == "here\n"
            (tmp_path / "besieged").touch()
            outcomes = running.wait(LIMIT_S)
            strangers.kill()
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert outcomes[0].result == [str(number) for number in range(2, 100)]
    finally:
        started.close()


def test_the_warning_says_that_anybody_is_let_in(tmp_path: Path) -> None:
    started = Cluster("file", tmp_path)
    try:
        (text,) = started.run(warned_of, 1, args=(started.new_init_method(),), init=False)
        assert "without authentication (insecure): whoever reaches a port" in text
    finally:
        started.close()


def warned_of(rank: int, method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=method, insecure=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rpc.init_rpc("w0", rank=0, world_size=1, rpc_backend_options=options)
    rpc.shutdown()
    return "; ".join(str(one.message) for one in caught)
