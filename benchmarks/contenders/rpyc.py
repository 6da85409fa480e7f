"""RPyC: a threaded server over TCP; tensors as bytes.

Two of its constants are changed, in its favour. Compression, which random bytes only slow down, is off. And its stream,
which writes 64 kB at a time and copies the rest after each, writes 16 MB at a time: 256 MB took it 40 s else.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import rpyc
import torch
from rpyc.core.channel import Channel
from rpyc.core.stream import SocketStream
from rpyc.utils.server import ThreadedServer

from benchmarks.contenders.functions import echo, noop, sink
from benchmarks.contenders.raw import to_bytes, to_tensor
from benchmarks.contenders.server import Server

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CONFIG = {"sync_request_timeout": None}
CONNECT_TRIES = 50
IO_CHUNK_NBYTES = 16 << 20


class _Service(rpyc.Service):  # type: ignore[misc]  # it ships no types
    def exposed_noop(self) -> None:
        noop()

    def exposed_echo(self, raw: bytes) -> bytes:
        return to_bytes(echo(to_tensor(raw)))

    def exposed_sink(self, raw: bytes) -> None:
        sink(to_tensor(raw))


class Rpyc:
    """One connection; the client waits for its answers on the calling thread."""

    def start(self) -> None:
        """See `Contender.start`."""
        torch.set_num_threads(1)
        self._server = Server(_serve)
        _tune()
        self._connection = _connect(self._server.address())
        root: Any = self._connection.root
        self._noop, self._echo, self._sink = root.noop, root.echo, root.sink
        self._start_noop = rpyc.async_(root.noop)

    def stop(self) -> None:
        """See `Contender.stop`."""
        self._connection.close()
        self._server.kill()

    def noop(self) -> None:
        """See `Contender.noop`."""
        self._noop()

    def noops(self, n: int) -> None:
        """See `Contender.noops`."""
        for result in [self._start_noop() for _ in range(n)]:
            result.wait()

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        """See `Contender.echo`."""
        return to_tensor(self._echo(to_bytes(x)), x.dtype)

    def sink(self, x: torch.Tensor) -> None:
        """See `Contender.sink`."""
        self._sink(to_bytes(x))


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    _tune()
    server = ThreadedServer(_Service(), hostname="127.0.0.1", port=0)
    pipe.send(server.port)
    server.start()


def _tune() -> None:
    Channel.COMPRESSION_THRESHOLD = sys.maxsize
    SocketStream.MAX_IO_CHUNK = IO_CHUNK_NBYTES


def _connect(port: int) -> Any:
    """Connect to the server, which binds its port a moment before it listens."""
    for _ in range(CONNECT_TRIES - 1):
        try:
            return rpyc.connect("127.0.0.1", port, config=CONFIG)
        except ConnectionRefusedError:
            time.sleep(0.1)
    return rpyc.connect("127.0.0.1", port, config=CONFIG)
