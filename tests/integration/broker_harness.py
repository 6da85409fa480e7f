"""A real broker process, and workers of it: in this process, or in one of their own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zmq

from zrpc.membership.broker import BrokerGroup
from zrpc.secret import find_secret
from zrpc.transport.brokered import GRACE_S, BrokeredEndpoint
from zrpc.transport.credentials import Credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zrpc.ids import Incarnation
    from zrpc.membership.group import Member
    from zrpc.wire.envelope import Buffer

TIMEOUT_S = 20.0


def _start_zero_copy() -> None:
    """Make pyzmq start what frees sent memory: it lives as long as the process, and is no test's leak."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://once")
        other.connect("inproc://once")
        one.send(bytes(1 << 20), copy=False)
        other.recv()


_start_zero_copy()

GIVEN_UP = 3
"""The exit code of a `WorkerProcess` that has lost another worker, where it is to end then."""

WORKER_SCRIPT = """
import os, sys
from tests.integration.broker_harness import Worker
address, name, world_size, ends_when_alone = sys.argv[1:]
worker = Worker(address)
worker.join(name, int(world_size) or None)
worker.start(echo=True)
print("joined", flush=True)
if ends_when_alone:
    worker.seen.wait(lambda: worker.seen.lost, 3600)
    os._exit(3)
sys.stdin.read()
"""


class Broker:
    """A broker process on a free port, with `environment` besides that of this process."""

    def __init__(self, *options: str, bind: str = "tcp://127.0.0.1:0", **environment: str) -> None:
        command = [sys.executable, "-m", "zrpc_broker", "--bind", bind, *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> str:
        """End it, whatever state it is in; what it wrote to its standard error."""
        self.process.kill()
        return self.process.communicate()[1]


@contextmanager
def running_broker(*options: str, **environment: str) -> Iterator[Broker]:
    broker = Broker(*options, **environment)
    try:
        yield broker
    finally:
        broker.close()


@dataclass
class Seen:
    """What a worker was told, and a way to wait for it."""

    frames: list[tuple[Incarnation, list[Buffer]]] = field(default_factory=list)
    lost: list[tuple[Incarnation, str]] = field(default_factory=list)
    joined: list[Member] = field(default_factory=list)
    left: list[tuple[Incarnation, bool, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, what: list[Any], entry: Any) -> None:
        with self.changed:
            what.append(entry)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout_s), f"not seen within {timeout_s} s: {self}"


class Worker:
    """A worker as far as transport and membership go."""

    def __init__(
        self, address: str | Sequence[str], group: str | None = None, *, local: bool = True,
        credentials: Credentials | None = None, life: Incarnation | None = None, grace_s: float = GRACE_S,
    ) -> None:  # fmt: skip
        credentials = credentials or Credentials(find_secret())
        life = life or credentials.new_life()
        self.endpoint = BrokeredEndpoint(address, life, local=local, credentials=credentials, grace_s=grace_s)
        self.incarnation = self.endpoint.incarnation
        self.group = BrokerGroup(self.endpoint, group)
        self.seen = Seen()
        self.hold = threading.Event()
        self.hold.set()
        self.members: list[Member] = []

    def join(self, name: str, world_size: int | None, rank: int = -1, timeout_s: float = TIMEOUT_S) -> Member:
        seen = self.seen
        self.group.watch(lambda member: seen.add(seen.joined, member), lambda *what: seen.add(seen.left, what))
        me, self.members = self.group.join(name, rank, world_size, self.incarnation, {"of": name}, timeout_s)
        return me

    def start(self, echo: bool = False) -> None:
        def on_frames(source: Incarnation, frames: list[Buffer]) -> None:
            self.hold.wait()
            if echo:
                self.endpoint.send(source, frames)
            else:
                self.seen.add(self.seen.frames, (source, frames))

        self.endpoint.start(on_frames, lambda *what: self.seen.add(self.seen.lost, what))

    def close(self) -> None:
        self.group.leave(TIMEOUT_S)
        self.endpoint.close(flush_s=1.0)


@contextmanager
def workers(
    address: str | Sequence[str], *names: str, world_size: int | None = 0, local: bool = True, grace_s: float = GRACE_S
) -> Iterator[list[Worker]]:
    """Started workers of one group; `world_size` 0: static, of as many as there are names."""
    made = [Worker(address, local=local, grace_s=grace_s) for _ in names]
    try:
        size = len(names) if world_size == 0 else world_size
        threads = [
            threading.Thread(target=worker.join, args=(name, size)) for worker, name in zip(made, names, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in made:
            worker.start()
        yield made
    finally:
        for worker in made:
            worker.hold.set()
            worker.close()


class WorkerProcess:
    """A worker in a process of its own, which echoes what it gets."""

    def __init__(self, address: str, name: str, world_size: int, *, ends_when_alone: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER_SCRIPT, address, name, str(world_size), "yes" if ends_when_alone else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_joined(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "joined\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
