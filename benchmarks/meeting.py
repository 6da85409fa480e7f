"""Where workers meet: one `init_method` a group, and what must run for it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def at_file() -> Iterator[str]:
    """A fresh file."""
    with tempfile.TemporaryDirectory(prefix="zrpc-bench-") as directory:
        yield f"file://{directory}/store"


@contextlib.contextmanager
def at_tcp() -> Iterator[str]:
    """A free port of this machine, which rank 0 is to listen on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    yield f"tcp://127.0.0.1:{port}"


@contextlib.contextmanager
def at_broker() -> Iterator[str]:
    """A broker of its own."""
    command = [sys.executable, "-m", "zrpc_broker", "--bind", "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as broker:
        assert broker.stdout is not None
        try:
            yield "broker://" + broker.stdout.readline().split("tcp://")[-1].strip()
        finally:
            broker.terminate()
