"""What members notice of strangers who connect: latency of their calls, memory, threads, before and meanwhile.

    python -m benchmarks.flood                          10,000 connections that say nothing, kept open
    python -m benchmarks.flood --kind half              that say half of a greeting
    python -m benchmarks.flood --kind rush              that are closed and made again as fast as one process can
    python -m benchmarks.flood --count 2000 --broker    at a broker, which relays the members' calls

Two workers without shared memory call each other; a third process plays the strangers.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import zrpc as rpc
from zrpc.agent.current import current_agent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

HALF = b"\xff" + bytes(8) + b"\x7f\x03"


def noop() -> None:
    """What is called."""


def listens_at() -> str | None:
    """Where this worker listens; None: with a broker nowhere."""
    return current_agent().address


def facts() -> tuple[int, int, int]:
    """Resident memory in MiB, threads and open files of this process."""
    process = psutil.Process()
    return process.memory_info().rss >> 20, process.num_threads(), process.num_fds()


def latency_us(calls: int = 2000) -> tuple[float, float]:
    """Median and 99th percentile of calls, in microseconds."""
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        rpc.rpc_sync("w1", noop)
        times.append((time.perf_counter() - began) * 1e6)
    times.sort()
    return statistics.median(times), times[int(0.99 * calls)]


def work(rank: int, method: str, told: Connection) -> None:
    """The life of one worker. Rank 0 measures when it is told a word, and says what it found."""
    options = rpc.RpcBackendOptions(init_method=method, shared_memory=False)
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        told.send(rpc.rpc_sync("w1", listens_at))
        latency_us()
        while told.recv():
            told.send((latency_us(), rpc.rpc_sync("w1", facts)))
    rpc.shutdown()


def besiege(address: str, count: int, kind: str, ready: Connection) -> None:
    """Play the strangers, until killed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, count + 1000)), hard))
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    connections: list[socket.socket] = []
    has_said = False
    while True:
        with contextlib.suppress(OSError):
            sock = socket.create_connection((host, int(port)), timeout=5)
            if kind == "half":
                sock.sendall(HALF)
            connections.append(sock)
        if len(connections) >= (1 if kind == "rush" else count):
            if not has_said:
                ready.send(len(connections))
                has_said = True
            if kind == "rush":
                connections.pop().close()
            else:
                connections = _still_open(connections)
                time.sleep(0.01)


def _still_open(connections: list[socket.socket]) -> list[socket.socket]:
    kept = []
    for sock in connections:
        sock.setblocking(False)
        try:
            is_open = sock.recv(4096) != b""
        except BlockingIOError:
            is_open = True
        except OSError:
            is_open = False
        if is_open:
            kept.append(sock)
        else:
            sock.close()
    return kept


def main() -> None:
    """Measure before, during and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--kind", choices=["silent", "half", "rush"], default="silent")
    parser.add_argument("--broker", action="store_true")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        method, broker = f"file://{Path(folder) / 'store'}", None
        if args.broker:
            command = [sys.executable, "-u", "-m", "zrpc_broker", "--bind", "tcp://127.0.0.1:0"]
            broker = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(broker.kill)
            assert broker.stdout is not None
            method = broker.stdout.readline().split()[-1].replace("tcp://", "broker://")
        ends = [spawn.Pipe() for _ in range(2)]
        workers = [spawn.Process(target=work, args=(rank, method, ends[rank][1])) for rank in range(2)]
        for worker in workers:
            worker.start()
        told = ends[0][0]
        address = told.recv() or method.replace("broker://", "tcp://")

        def show(what: str) -> None:
            told.send(True)
            (median, late), (memory, threads, files) = told.recv()
            if broker is not None:
                process = psutil.Process(broker.pid)
                memory, threads, files = process.memory_info().rss >> 20, process.num_threads(), process.num_fds()
            print(f"{what:10} {median:8.0f} us, 99 %: {late:8.0f} us, {memory} MiB, {threads} threads, {files} files")

        show("before")
        ready, said = spawn.Pipe()
        strangers = spawn.Process(target=besiege, args=(address, args.count, args.kind, said), daemon=True)
        strangers.start()
        ready.recv()
        for _ in range(3):
            show(args.kind)
        strangers.kill()
        strangers.join()
        time.sleep(1)
        show("after")
        told.send(False)
        for worker in workers:
            worker.join()


if __name__ == "__main__":
    main()
