"""Real agents in one process, on a network in memory that a test can make misbehave."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.unit.agent.network import ReadElsewhere
from zrpc.agent import client
from zrpc.agent.agent import Agent
from zrpc.agent.execution import ASYNC_ATTRIBUTE
from zrpc.agent.future import Future, future_of
from zrpc.config import UNSET_RPC_TIMEOUT_S, RpcBackendOptions
from zrpc.errors import NotInitializedError, PeerLostError
from zrpc.ids import WorkerInfo, new_incarnation
from zrpc.membership.group import Member
from zrpc.rref import rref as rref_module
from zrpc.rref import travel as travel_module
from zrpc.rref.context import RRefContext
from zrpc.rref.making import remote_python
from zrpc.rref.rref import RRef
from zrpc.rref.serving import install
from zrpc.wire import pickling
from zrpc.wire.envelope import decode
from zrpc.wire.messages import Failure, PythonCall, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pytest

    from zrpc.agent.call import Call
    from zrpc.ids import Incarnation

RETRY_S = 0.05
_here = threading.local()


def current() -> Agent:
    agent: Agent | None = getattr(_here, "agent", None)
    if agent is None:
        raise NotInitializedError("this thread is no worker's")
    return agent


@dataclass
class Packet:
    source: Incarnation
    to: Incarnation
    frames: list[bytes]
    message: Any
    call_id: int


@dataclass
class Chaos:
    """How the network misbehaves: chances of repeating and of losing a control message or its acknowledgement."""

    seed: int = 0
    reorder: bool = False
    repeat: float = 0.0
    lose: float = 0.0


class Network:
    """Delivers on one thread. `hold(message type)` keeps messages back until `release`."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.endpoints: dict[Incarnation, FakeEndpoint] = {}
        self._random = random.Random(chaos.seed)
        self._changed = threading.Condition()
        self._packets: list[Packet] = []
        self.held: list[Packet] = []
        self._holding: tuple[type, ...] = ()
        self._control_calls: set[tuple[Incarnation, int]] = set()
        self._dead: set[Incarnation] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._deliver, name="network")
        self._thread.start()

    def put(self, packet: Packet) -> None:
        with self._changed:
            if packet.to in self._dead or packet.source in self._dead:
                raise PeerLostError("dead")
            message = packet.message
            if not isinstance(message, Reply | Failure) and message.IDEMPOTENT:
                self._control_calls.add((packet.source, packet.call_id))
            if isinstance(message, self._holding):
                self.held.append(packet)
                self._changed.notify_all()
                return
            is_control = (
                message.IDEMPOTENT
                if not isinstance(message, Reply | Failure)
                else (packet.to, packet.call_id) in self._control_calls
            )
            copies = 1
            if is_control and self._random.random() < self.chaos.lose:
                copies = 0
            elif is_control and self._random.random() < self.chaos.repeat:
                copies = 2
            self._packets += [packet] * copies
            self._changed.notify_all()

    def hold(self, *types: type) -> None:
        with self._changed:
            self._holding = types

    def wait_held(self, n: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.held) >= n, 10)

    def release(self) -> None:
        with self._changed:
            self._holding = ()
            self._packets += self.held
            self.held.clear()
            self._changed.notify_all()

    def discard_held(self) -> None:
        with self._changed:
            self._holding = ()
            self.held.clear()

    def kill(self, dead: Incarnation) -> None:
        with self._changed:
            self._dead.add(dead)
        for incarnation, endpoint in self.endpoints.items():
            if incarnation not in self._dead:
                endpoint.on_lost(dead, "killed")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._packets or self._closed)
                if self._closed:
                    return
                index = self._random.randrange(len(self._packets)) if self.chaos.reorder else 0
                packet = self._packets.pop(index)
                endpoint = self.endpoints.get(packet.to)
                dropped = packet.to in self._dead
            if endpoint is not None and endpoint.is_open and not dropped:
                endpoint.on_frames(packet.source, list(packet.frames))


class FakeEndpoint:
    def __init__(self, network: Network) -> None:
        self.incarnation = new_incarnation()
        self.inbox = ReadElsewhere()
        self.is_encrypted = False
        self.is_open = False
        self._network = network
        network.endpoints[self.incarnation] = self

    def start(
        self, on_frames: Callable[[Incarnation, list[Any]], None], on_lost: Callable[[Incarnation, str], None]
    ) -> None:
        self.on_frames, self.on_lost = on_frames, on_lost
        self.is_open = True

    def meet(self, peer: Incarnation) -> None:
        """See `Endpoint`."""

    def queued_nbytes(self, to: Incarnation) -> int:
        return 0

    def release(self) -> None:
        """See `Endpoint`."""

    def send(self, to: Incarnation, frames: Sequence[Any]) -> None:
        copied = [bytes(frame) for frame in frames]
        envelope = decode(copied)
        self._network.put(Packet(self.incarnation, to, copied, envelope.message, envelope.call_id))

    def watch(self, peer: Incarnation) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        self.is_open = False


class FakeGroup:
    def __init__(self, members: list[Member]) -> None:
        self._members = members

    def watch(self, *_: Any) -> None:
        pass

    def join(self, name: str, rank: int, *_: Any) -> tuple[Member, list[Member]]:
        return self._members[rank], self._members

    def refresh(self) -> None:
        pass

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        pass


class Worker:
    """One agent with RRefs.

    Attributes:
        passes: the arguments of the backward passes that ran here.
    """

    def __init__(self, endpoint: FakeEndpoint, members: list[Member], rank: int) -> None:
        options = RpcBackendOptions(rpc_timeout=20)
        group: Any = FakeGroup(members)
        ignore: Any = lambda _: None  # noqa: E731
        self.agent = Agent(options, endpoint, group, None, ignore, ignore)
        for pool in (self.agent._server.pool, self.agent.completions._pool):
            vars(pool)["submit"] = self._as_me(pool.submit)
        self.passes: list[tuple[Any, ...]] = []
        install(self.agent, DirectInvoker(self.agent), lambda *args: self.passes.append(args))
        self.rrefs: RRefContext = self.agent.extensions[RRefContext]
        self.agent.join(f"worker{rank}", rank, len(members), {}, 1.0)
        self.agent.open()

    @property
    def info(self) -> WorkerInfo:
        return self.agent.info

    def _as_me(self, submit: Callable[[Callable[[], None]], None]) -> Callable[[Callable[[], None]], None]:
        def run(task: Callable[[], None]) -> None:
            with self:
                task()

        return lambda task: submit(lambda: run(task))

    def __enter__(self) -> Worker:
        self._outer = getattr(_here, "agent", None)
        _here.agent = self.agent
        return self

    def __exit__(self, *_: object) -> None:
        _here.agent = None

    def call(self, to: Worker, func: Any, *args: Any, timeout: float = -1.0) -> Any:
        """rpc_sync from this worker."""
        with self:
            return self.rrefs.invoke.rpc_sync(to.info, func, args, None, timeout)

    def remote(self, to: Worker, func: Any, *args: Any, timeout: float = -1.0) -> RRef[Any]:
        """remote from this worker."""
        with self:
            return self.rrefs.invoke.remote(to.info, func, args, None, timeout)

    def local(self, value: Any) -> RRef[Any]:
        """RRef(value) on this worker."""
        with self:
            return RRef(value)

    def wait_counts(self, **wanted: int) -> None:
        """Wait until the debug info shows the numbers `wanted`."""

        def there(_: object) -> bool:
            table = self.rrefs._table
            found = {
                "owners": table.num_owned, "users": table.num_users, "children": table.num_children,
                "unconfirmed": table.num_unconfirmed_users, "sending": self.rrefs._num_sending,
            }  # fmt: skip
            self._seen = found
            return all(found[name] == number for name, number in wanted.items())

        assert self.rrefs._wait_until(there, time.monotonic() + 10), (self.info, self._seen, wanted)

    def wait_lost(self, peer: Worker) -> None:
        """Wait until this worker's RRefs know of the loss of `peer`."""
        life = peer.info.incarnation
        assert self.rrefs._wait_until(lambda table: table.is_lost(life), time.monotonic() + 10)


class DirectInvoker:
    """Calls of proxies, straight through the agent: the api knows only the one worker of its process."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def rpc_sync(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], kwargs: None, timeout: float
    ) -> Any:
        """See `Invoker`."""
        return pickling.loads(self._call(to, func, args, timeout, waited=True).wait())

    def rpc_async(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], kwargs: None, timeout: float
    ) -> Future[Any]:
        """See `Invoker`."""
        return future_of(self._call(to, func, args, timeout, waited=False), pickling.loads, self._agent.completions)

    def remote(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], kwargs: None, timeout: float
    ) -> RRef[Any]:
        """See `Invoker`."""
        payload = pickling.dumps((func, args, {}))
        return remote_python(self._agent, to, payload, _limit_s(timeout), hasattr(func, ASYNC_ATTRIBUTE))

    def _call(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], timeout: float, *, waited: bool
    ) -> Call:
        message = PythonCall(hasattr(func, ASYNC_ATTRIBUTE))
        payload = pickling.dumps((func, args, {}))
        return self._agent.request(to, message, payload, timeout_s=_limit_s(timeout), hooked=True, waited=waited)


def _limit_s(timeout: float) -> float | None:
    return None if timeout == UNSET_RPC_TIMEOUT_S else timeout


class Cluster:
    def __init__(self, size: int, chaos: Chaos) -> None:
        self.network = Network(chaos)
        self.endpoints = endpoints = [FakeEndpoint(self.network) for _ in range(size)]
        members = [
            Member(WorkerInfo(f"worker{rank}", rank), endpoint.incarnation) for rank, endpoint in enumerate(endpoints)
        ]
        self.workers = [Worker(endpoint, members, rank) for rank, endpoint in enumerate(endpoints)]
        self.incarnations = [endpoint.incarnation for endpoint in endpoints]

    def kill(self, rank: int) -> None:
        self.network.kill(self.incarnations[rank])

    def close(self) -> None:
        for worker in self.workers:
            worker.rrefs.destroy(ignore_leak=True)
            worker.agent.close(1.0)
        self.network.close()


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch, size: int = 3, chaos: Chaos | None = None) -> Iterator[Cluster]:
    """`size` workers; closed at the end."""
    monkeypatch.setattr(client, "NOTIFY_TIMEOUT_S", RETRY_S)
    monkeypatch.setattr(rref_module, "current_agent", current)
    monkeypatch.setattr(travel_module, "current_agent", current)
    made = Cluster(size, chaos or Chaos())
    try:
        yield made
    finally:
        made.close()
