"""What the machine allows: the same messages without calls, threads, pickles or anything else around them.

Three lines between two processes of one thread each. Tensors arrive in memory that is there already (but for
ZeroMQ's), and nobody owns what arrived: the next message is written over it. Who waits polls; after something large,
where the kernel or ZeroMQ's threads copy, it sleeps, since polling beside the copies would slow them.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Protocol

import torch
import zmq

from benchmarks.contenders.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    Buffer = bytes | memoryview

NOOP, ECHO, SINK = b"n", b"e", b"s"
LARGE_NBYTES = 512 << 10
"""From here on no line makes a copy of its own, as zrpc over TCP does not."""
REGION_NBYTES = 256 << 20
SEND_BUFFER_NBYTES = 512 << 10
"""What the kernel chooses by itself leaves the caches."""
_HEADER = struct.Struct("<cQ")  # what is wanted, how many bytes follow


class Line(Protocol):
    """One end of a connection."""

    def send(self, kind: bytes, data: Buffer) -> None:
        """Send what is wanted and its data."""

    def receive(self) -> tuple[bytes, memoryview]:
        """The next message. Its data is good until the one after."""


class Bare:
    """A client and a server with a line between.

    Args:
        listen: makes the server's end and gives its address to the pipe.
        connect: makes the client's end, given the address.
    """

    def __init__(self, listen: Callable[[Connection], Line], connect: Callable[[Any], Line]) -> None:
        self._listen = listen
        self._connect = connect

    def start(self) -> None:
        """See `Contender.start`."""
        torch.set_num_threads(1)
        self._server = Server(_serve, self._listen)
        self._line = self._connect(self._server.address())

    def stop(self) -> None:
        """See `Contender.stop`."""
        self._server.kill()

    def noop(self) -> None:
        """See `Contender.noop`."""
        self._call(NOOP)

    def noops(self, n: int) -> None:
        """See `Contender.noops`."""
        for _ in range(n):
            self._line.send(NOOP, b"")
        for _ in range(n):
            self._line.receive()

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        """See `Contender.echo`."""
        return torch.frombuffer(self._call(ECHO, _memory(x)), dtype=x.dtype)

    def sink(self, x: torch.Tensor) -> None:
        """See `Contender.sink`."""
        self._call(SINK, _memory(x))

    def _call(self, kind: bytes, data: Buffer = b"") -> memoryview:
        self._line.send(kind, data)
        return self._line.receive()[1]


class TcpLine:
    """A loopback connection of the kernel's.

    Where memory begins matters: 16 bytes behind a page's beginning, as a large `bytearray` does, both ways of an echo
    take twice as long (measured on an AMD EPYC). So it is a tensor's.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
        self._memory = _memory(torch.zeros(REGION_NBYTES, dtype=torch.uint8))
        self._header = bytearray(_HEADER.size)
        self._flags: int = socket.MSG_DONTWAIT

    def send(self, kind: bytes, data: Buffer) -> None:
        """See `Line.send`."""
        header = _HEADER.pack(kind, len(data))
        self._take_note(len(data))
        if len(data) < LARGE_NBYTES:
            self._sock.sendall(header + data)
        else:
            self._sock.sendall(header)
            self._sock.sendall(data)

    def receive(self) -> tuple[bytes, memoryview]:
        """See `Line.receive`."""
        self._receive_into(memoryview(self._header))
        kind, nbytes = _HEADER.unpack(self._header)
        self._take_note(nbytes)
        data = self._memory[:nbytes]
        self._receive_into(data)
        return kind, data

    def _receive_into(self, memory: memoryview) -> None:
        received = 0
        while received < len(memory):
            try:
                received += self._sock.recv_into(memory[received:], 0, self._flags)
            except BlockingIOError:
                continue

    def _take_note(self, nbytes: int) -> None:
        self._flags = socket.MSG_DONTWAIT if nbytes < LARGE_NBYTES else 0


class ZmqLine:
    """Two ZeroMQ sockets over loopback TCP. Data arrives in memory of ZeroMQ's, new each time."""

    def __init__(self, sock: zmq.Socket[bytes]) -> None:
        self._sock = sock
        self._flags: int = zmq.NOBLOCK

    def send(self, kind: bytes, data: Buffer) -> None:
        """See `Line.send`."""
        is_large = len(data) >= LARGE_NBYTES
        self._flags = 0 if is_large else zmq.NOBLOCK
        self._sock.send_multipart([kind, data], copy=not is_large)

    def receive(self) -> tuple[bytes, memoryview]:
        """See `Line.receive`."""
        while True:
            try:
                kind, data = self._sock.recv_multipart(self._flags, copy=False)
                self._flags = 0 if len(data) >= LARGE_NBYTES else zmq.NOBLOCK
                return bytes(kind.buffer), data.buffer
            except zmq.Again:
                os.sched_yield()  # to ZeroMQ's thread


class MemoryLine:
    """A Unix socket for what is small, and shared memory for what is large. An echo is the memory that came."""

    def __init__(self, sock: socket.socket, file: int) -> None:
        self._sock = sock
        self._memory = memoryview(mmap.mmap(file, REGION_NBYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))

    def send(self, kind: bytes, data: Buffer) -> None:
        """See `Line.send`."""
        if len(data) < LARGE_NBYTES:
            self._sock.send(kind + data)
            return
        if not (isinstance(data, memoryview) and data.obj is self._memory.obj):
            self._memory[: len(data)] = data
        self._sock.send(_HEADER.pack(kind.upper(), len(data)))

    def receive(self) -> tuple[bytes, memoryview]:
        """See `Line.receive`."""
        while True:
            try:
                message = self._sock.recv(1 + LARGE_NBYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            kind = message[:1]
            if kind.islower():
                return kind, memoryview(bytearray(message))[1:]
            return kind.lower(), self._memory[: _HEADER.unpack(message)[1]]


def tcp() -> Bare:
    """Over a bare TCP connection."""
    return Bare(_listen_tcp, _connect_tcp)


def zeromq() -> Bare:
    """Over bare ZeroMQ sockets."""
    return Bare(_listen_zmq, _connect_zmq)


def memory() -> Bare:
    """Through shared memory, with a Unix socket to tell of it."""
    return Bare(_listen_memory, _connect_memory)


def _listen_tcp(pipe: Connection) -> Line:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname())
        return TcpLine(server.accept()[0])


def _connect_tcp(address: Any) -> Line:
    return TcpLine(socket.create_connection(address))


def _listen_zmq(pipe: Connection) -> Line:
    sock = _zmq_socket()
    port = sock.bind_to_random_port("tcp://127.0.0.1")
    pipe.send(f"tcp://127.0.0.1:{port}")
    return ZmqLine(sock)


def _connect_zmq(address: Any) -> Line:
    sock = _zmq_socket()
    sock.connect(address)
    return ZmqLine(sock)


def _zmq_socket() -> zmq.Socket[bytes]:
    sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    sock.set_hwm(0)
    return sock


def _listen_memory(pipe: Connection) -> Line:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind("")  # the kernel chooses an abstract name
        server.listen()
        pipe.send(server.getsockname())
        sock = server.accept()[0]
    _, files, _, _ = socket.recv_fds(sock, 1, 1)
    return MemoryLine(sock, files[0])


def _connect_memory(address: Any) -> Line:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(address)
    file = os.memfd_create("benchmark")
    os.truncate(file, REGION_NBYTES)
    socket.send_fds(sock, [NOOP], [file])
    return MemoryLine(sock, file)


def _serve(pipe: Connection, listen: Callable[[Connection], Line]) -> None:
    torch.set_num_threads(1)
    line = listen(pipe)
    while True:
        kind, data = line.receive()
        line.send(kind, data if kind == ECHO else b"")


def _memory(x: torch.Tensor) -> memoryview:
    """The bytes of `x`, which is flat."""
    return x.view(torch.uint8).numpy().data
