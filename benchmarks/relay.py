"""What the broker alone does, loaded by plain ZeroMQ sockets; and what ZeroMQ's encryption costs without zrpc.

    python -m benchmarks.relay
    python -m benchmarks.relay --only joins        one of small, large, joins, small_groups, curve

small, large: in each of two processes two workers relay messages of 64 bytes and of 1 MiB through a broker, at most
`WINDOW` unread. joins, small_groups: 1,000 workers register one after another, and stay; in one group, whose others are
all told each time, and in groups of 10. curve: a DEALER sends to a ROUTER, and libsodium encrypts in memory. Each with
authentication, and with `insecure=True`, where nothing is encrypted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import ctypes.util
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import zmq

from benchmarks.machine import facts, record
from benchmarks.results import show
from zrpc.ids import new_incarnation
from zrpc.secret import find_secret
from zrpc.transport import sockets
from zrpc.transport.credentials import Credentials, KeyPair, make_pair
from zrpc.transport.identities import BROKER, RECEIVER, SENDER
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Register, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.ids import Incarnation

WORKERS = 1000
SMALL_NBYTES = 64
LARGE_NBYTES = 1 << 20
SECONDS = 4.0
WINDOW = {SMALL_NBYTES: 512, LARGE_NBYTES: 16}
FILES = 8192


class LightWorker:
    """A worker that is two sockets: no threads, no reader.

    Args:
        context: of the sockets.
        address: the broker's.
        credentials: None where it is `insecure`.
    """

    def __init__(self, context: zmq.Context[Any], address: str, credentials: Credentials | None) -> None:
        self.incarnation = new_incarnation()
        self._to = sockets.make_socket(context, zmq.DEALER, SENDER + self.incarnation)
        self._from = sockets.make_socket(context, zmq.DEALER, RECEIVER + self.incarnation)
        for sock in (self._to, self._from):
            sockets.connect(sock, address, credentials)
        self._from.send(b"")

    def register(self, name: str, group: str, size: int) -> None:
        """Ask the broker to be let in."""
        self.send(BROKER, *encode(Envelope(Register(name, -1, size, {}, group), 0)))

    def welcomed(self) -> list[Incarnation]:
        """Wait for the welcome; all members."""
        while True:
            source, *frames = self._from.recv_multipart()
            message = decode(list(frames)).message if source == BROKER else None
            if isinstance(message, Welcome):
                return [member[0] for member in message.members]

    def send(self, to: bytes, *frames: Any) -> None:
        """Send a message to a worker, or to the broker."""
        self._to.send_multipart([to, *frames], copy=False)

    def receive(self) -> list[zmq.Frame]:
        """Wait for one."""
        return self._from.recv_multipart(copy=False)


def exchange(address: str, credentials: Credentials | None, pair: int, nbytes: int, told: Any) -> None:
    """Two workers in one process: one sends, the other receives; says how many messages a second came."""
    with zmq.Context() as context:
        context.linger = 0
        one, other = (LightWorker(context, address, credentials) for _ in range(2))
        for number, worker in enumerate((one, other)):
            worker.register(f"worker{number}", f"pair{pair}", 2)
        one.welcomed()
        other.welcomed()
        body = bytes(nbytes)
        for _ in range(WINDOW[nbytes]):
            one.send(other.incarnation, body)
        told.send(True)
        told.recv()
        came, began = 0, time.perf_counter()
        while (took_s := time.perf_counter() - began) < SECONDS:
            other.receive()
            one.send(other.incarnation, body)
            came += 1
        told.send(came / took_s)
        told.recv()
        context.destroy(linger=0)


def relayed(address: str, credentials: Credentials | None, nbytes: int, pairs: int = 2) -> float:
    """Messages a second, of `pairs` processes together."""
    spawn = multiprocessing.get_context("fork")
    ends = [spawn.Pipe() for _ in range(pairs)]
    processes = [
        spawn.Process(target=exchange, args=(address, credentials, pair, nbytes, ends[pair][1]))
        for pair in range(pairs)
    ]
    for process in processes:
        process.start()
    for what in range(2):
        got = [here.recv() for here, _ in ends]
        for here, _ in ends:
            here.send(what)
    for process in processes:
        process.join()
    return float(sum(got))


def joins(address: str, credentials: Credentials | None, broker: psutil.Process, group_size: int) -> str:
    """1,000 workers come to groups that grow, each once the one before was let in; all others of its group are told."""
    _open_many()
    before = broker.memory_info().rss
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 4 * WORKERS)
        workers, began = [], time.perf_counter()
        for number in range(WORKERS):
            workers.append(LightWorker(context, address, credentials))
            workers[-1].register(f"worker{number}", f"light{number // group_size}", 0)
            workers[-1].welcomed()
        took_s = time.perf_counter() - began
        added = broker.memory_info().rss - before
        context.destroy(linger=0)
    return f"{show(WORKERS / took_s)} joins/s, {added >> 20} MiB more"


def _open_many() -> None:
    """Let this process have as many files open as it may, up to `FILES`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, FILES), hard))


@contextlib.contextmanager
def running_broker(insecure: bool) -> Iterator[tuple[str, psutil.Process]]:
    """A broker process, its address."""
    command = [sys.executable, "-u", "-m", "zrpc_broker", "--bind", "tcp://127.0.0.1:0"]
    environment = {**os.environ, **({"ZRPC_INSECURE": "1"} if insecure else {})}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, preexec_fn=_open_many
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], psutil.Process(process.pid)
        finally:
            process.kill()


def transfer(told: Any, nbytes: int, server: KeyPair | None) -> None:
    """The sending end of `curve`."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        if server is not None:
            sock.curve_serverkey = server.public
            sock.curve_publickey, sock.curve_secretkey = make_pair()
        sock.connect(told.recv())
        body = bytes(nbytes)
        for _ in range(64):
            sock.send(body, copy=False)
        while True:
            sock.recv()
            sock.send(body, copy=False)


def bare_gbps(nbytes: int, encrypted: bool) -> float:
    """GB/s from a DEALER in another process to a ROUTER here."""
    spawn = multiprocessing.get_context("fork")
    here, there = spawn.Pipe()
    server = make_pair() if encrypted else None
    sender = spawn.Process(target=transfer, args=(there, nbytes, server), daemon=True)
    sender.start()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        sock.linger = 0
        if server is not None:
            sock.curve_server = True
            sock.curve_secretkey = server.private
        here.send(f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}")
        came, began = 0, 0.0
        while not began or time.perf_counter() - began < SECONDS:
            who, _ = sock.recv_multipart(copy=False)
            sock.send_multipart([who, b""])
            came += 1
            began = began or time.perf_counter()
        took_s = time.perf_counter() - began
    sender.kill()
    sender.join()
    return (came - 1) * nbytes / took_s / 1e9


def libsodium_gbps(nbytes: int) -> float:
    """GB/s that one core encrypts, as CURVE does it: XSalsa20 and Poly1305."""
    found = ctypes.util.find_library("sodium")
    if found is None:
        return float("nan")
    library = ctypes.CDLL(found)
    library.sodium_init()  # without it the fastest code for this processor is not chosen
    encrypt = library.crypto_secretbox_easy
    plain, key, nonce = ctypes.create_string_buffer(nbytes), bytes(32), bytes(24)
    cipher = ctypes.create_string_buffer(nbytes + 16)
    rounds = 0
    began = time.perf_counter()
    while (took_s := time.perf_counter() - began) < SECONDS:
        encrypt(cipher, plain, ctypes.c_ulonglong(nbytes), nonce, key)
        rounds += 1
    return rounds * nbytes / took_s / 1e9


def encrypting(nbytes: int) -> list[str]:
    """The cells of one row: ZeroMQ without zrpc, encrypted and plain; libsodium without ZeroMQ."""
    encrypted, plain = bare_gbps(nbytes, True), bare_gbps(nbytes, False)
    return [f"{show(encrypted)} GB/s", f"{show(plain)} GB/s"]


def throughput(address: str, credentials: Credentials | None, nbytes: int) -> str:
    """Of messages of one size."""
    rate = relayed(address, credentials, nbytes)
    return f"{show(rate)} messages/s" if nbytes < LARGE_NBYTES else f"{show(rate * nbytes / 1e9)} GB/s"


MEASURES: dict[str, tuple[str, Callable[[str, Credentials | None, psutil.Process], str]]] = {
    "small": ("relayed, 64 B", lambda address, credentials, _: throughput(address, credentials, SMALL_NBYTES)),
    "large": ("relayed, 1 MiB", lambda address, credentials, _: throughput(address, credentials, LARGE_NBYTES)),
    "joins": (f"{WORKERS} workers join one group", partial(joins, group_size=WORKERS)),
    "small_groups": (f"{WORKERS} workers join groups of 10", partial(joins, group_size=10)),
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*MEASURES, "curve"], action="append")
    parser.add_argument("--out", type=Path, help="where the table is written")
    args = parser.parse_args()
    wanted = args.only or [*MEASURES, "curve"]
    lines = ["| | authenticated | `insecure=True` |", "| --- | ---: | ---: |"]
    for name, (label, measure) in MEASURES.items():
        if name in wanted:
            cells = []
            for credentials in (Credentials(find_secret()), None):
                with running_broker(credentials is None) as (address, broker):
                    cells.append(measure(address, credentials, broker))
            lines.append(f"| {label} | {' | '.join(cells)} |")
    if "curve" in wanted:
        lines += [
            f"| ZeroMQ without zrpc, {nbytes >> 20} MiB frames | {' | '.join(encrypting(nbytes))} |"
            for nbytes in (LARGE_NBYTES, 16 * LARGE_NBYTES)
        ]
        lines.append(f"| libsodium on one core, 1 MiB in memory | {show(libsodium_gbps(LARGE_NBYTES))} GB/s | |")
    record("\n".join([f"{facts()}.", "", *lines, ""]), args.out, "relay.md")


if __name__ == "__main__":
    main()
