"""Starting where the name server does not answer.

Each worker has a mount namespace of its own, with a `resolv.conf` whose name server is a socket of the test that never
answers. One question that is waited for would take 150 s there, longer than the start may.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.harness import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DNS_PORT = 53
LIMIT_S = 120.0
SERVERS = ("127.0.53.1", "127.0.53.2")
IN_NAMESPACE = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'

WORKER = """
import sys
import zrpc as rpc

rank, method = int(sys.argv[1]), sys.argv[2]
options = rpc.RpcBackendOptions(init_method=method, rpc_timeout=60)
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
print(rpc.rpc_sync(f"worker{1 - rank}", divmod, args=(7, 2)), flush=True)
rpc.shutdown()
"""


def start(command: list[str], server: str, folder: Path) -> subprocess.Popen[str]:
    """A process whose only name server is `server`."""
    resolv = folder / f"resolv.{server}"
    resolv.write_text(f"nameserver {server}\noptions timeout:30 attempts:5\n")
    environment = {name: value for name, value in os.environ.items() if name != "RES_OPTIONS"}
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", IN_NAMESPACE, "sh", str(resolv), *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture
def name_servers(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """Two that never answer."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here: a worker cannot be given a name server of its own")
    probe = start(["true"], SERVERS[0], tmp_path)
    error = probe.communicate()[1]
    if probe.returncode:
        pytest.skip(f"a mount namespace cannot be made here: {error.strip()}")
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in SERVERS]
    try:
        try:
            for one, address in zip(sockets, SERVERS, strict=True):
                one.bind((address, DNS_PORT))
                one.setblocking(False)
        except OSError as error:
            pytest.skip(f"the test cannot listen as a name server does: {error}")
        yield sockets
    finally:
        for one in sockets:
            one.close()


def was_asked(server: socket.socket) -> bool:
    try:
        server.recv(1024)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_start_waits_for_no_name_server(host: str, name_servers: list[socket.socket], tmp_path: Path) -> None:
    """Neither rank 0, whose server of torch's store would ask for the names of all, nor the others, who ask nothing."""
    method = f"tcp://{host}:{free_port()}"
    workers = [
        start([sys.executable, "-c", WORKER, str(rank), method], server, tmp_path)
        for rank, server in enumerate(SERVERS)
    ]
    try:
        ended = [worker.communicate(timeout=LIMIT_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [out for out, _ in ended] == ["(3, 1)\n"] * 2, ended
    assert was_asked(name_servers[0]), "rank 0 finds out that the name server does not answer"
    assert not was_asked(name_servers[1])
