"""gRPC: a server with a thread pool over TCP; tensors as bytes through generic handlers, so no message is compiled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import torch

from benchmarks.contenders.functions import echo, noop, sink
from benchmarks.contenders.raw import to_bytes, to_tensor
from benchmarks.contenders.server import Server

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SERVICE = "benchmark.Bench"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
HANDLER_THREADS = 16


class Grpc:
    """One channel."""

    def start(self) -> None:
        """See `Contender.start`."""
        torch.set_num_threads(1)
        self._server = Server(_serve)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._server.address()}", options=UNLIMITED)
        grpc.channel_ready_future(self._channel).result(timeout=30)
        # Without serializers, messages are bytes.
        self._noop = self._channel.unary_unary(f"/{SERVICE}/noop")
        self._echo = self._channel.unary_unary(f"/{SERVICE}/echo")
        self._sink = self._channel.unary_unary(f"/{SERVICE}/sink")

    def stop(self) -> None:
        """See `Contender.stop`."""
        self._channel.close()
        self._server.kill()

    def noop(self) -> None:
        """See `Contender.noop`."""
        self._noop(b"")

    def noops(self, n: int) -> None:
        """See `Contender.noops`."""
        for future in [self._noop.future(b"") for _ in range(n)]:
            future.result()

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        """See `Contender.echo`."""
        return to_tensor(self._echo(to_bytes(x)), x.dtype)

    def sink(self, x: torch.Tensor) -> None:
        """See `Contender.sink`."""
        self._sink(to_bytes(x))


def _noop(_: bytes, __: Any) -> bytes:
    noop()
    return b""


def _echo(raw: bytes, _: Any) -> bytes:
    return to_bytes(echo(to_tensor(raw)))


def _sink(raw: bytes, _: Any) -> bytes:
    sink(to_tensor(raw))
    return b""


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    server = grpc.server(ThreadPoolExecutor(HANDLER_THREADS), options=UNLIMITED)
    functions = {"noop": _noop, "echo": _echo, "sink": _sink}
    handlers = {name: grpc.unary_unary_rpc_method_handler(function) for name, function in functions.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()
