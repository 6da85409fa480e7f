"""Several workers in one process: real agents over a transport that is a queue a worker."""

from __future__ import annotations

import itertools
import random
import threading
from collections import defaultdict, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.unit.agent.network import ReadElsewhere
from zrpc.agent.agent import Agent
from zrpc.autograd.service import AutogradService
from zrpc.autograd.wiring import install
from zrpc.config import RpcBackendOptions
from zrpc.errors import PeerLostError
from zrpc.ids import Incarnation, WorkerInfo, new_incarnation
from zrpc.membership.group import Member, OnJoined, OnLeft
from zrpc.wire import pickling
from zrpc.wire.envelope import decode
from zrpc.wire.messages import BackwardRequest, PythonCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from zrpc.agent.call import Call
    from zrpc.agent.request import Request
    from zrpc.transport.endpoint import OnFrames, OnLost
    from zrpc.wire.envelope import Buffer


class Network:
    """The queues between workers. Messages of one worker to another keep their order; of several, chance decides."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.endpoints: dict[Incarnation, QueueEndpoint] = {}
        self.held: threading.Event | None = None

    def hold_gradients(self) -> threading.Event:
        """From now on deliver no `BackwardRequest`, until the event is set."""
        self.held = threading.Event()
        return self.held


class QueueEndpoint:
    """One worker's end: what is sent to it waits in queues until its reading thread takes it."""

    def __init__(self, network: Network) -> None:
        self.incarnation = new_incarnation()
        self.inbox = ReadElsewhere()
        self.is_encrypted = False
        self._network = network
        self._queues: defaultdict[Incarnation, deque[list[Buffer]]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        network.endpoints[self.incarnation] = self

    def start(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        self.on_lost = on_lost
        self._thread = threading.Thread(target=self._read, args=(on_frames,), daemon=True)
        self._thread.start()

    def meet(self, peer: Incarnation) -> None:
        """See `Endpoint`."""

    def queued_nbytes(self, to: Incarnation) -> int:
        return 0

    def release(self) -> None:
        """See `Endpoint`."""

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        peer = self._network.endpoints.get(to)
        if peer is None:
            raise PeerLostError("it is gone")
        copied: list[Buffer] = [frame if type(frame) is bytes else bytearray(frame) for frame in frames]
        with peer._changed:
            peer._queues[self.incarnation].append(copied)
            peer._changed.notify_all()

    def watch(self, peer: Incarnation) -> None:
        if peer not in self._network.endpoints:
            self.on_lost(peer, "it is gone")

    def interrupt(self) -> None:
        pass

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _read(self, on_frames: OnFrames) -> None:
        while True:
            with self._changed:
                while not (self._closed or any(self._queues.values())):
                    self._changed.wait()
                if self._closed:
                    return
                source = self._network.random.choice([source for source, queue in self._queues.items() if queue])
                frames = self._queues[source].popleft()
            held = self._network.held
            if held is not None and isinstance(decode(frames).message, BackwardRequest):
                held.wait()
            on_frames(source, frames)


class FixedGroup:
    """A group whose members are known beforehand."""

    def __init__(self, members: list[Member]) -> None:
        self._members = members

    def join(
        self, name: str, rank: int, world_size: int | None, incarnation: Incarnation, card: dict[str, Any],
        timeout_s: float,
    ) -> tuple[Member, list[Member]]:  # fmt: skip
        return self._members[rank], self._members

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        pass

    def refresh(self) -> None:
        pass

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        pass


class Worker:
    """One worker: `call` runs a function of the test on another, which is given that worker first."""

    def __init__(self, cluster: Cluster, rank: int, endpoint: QueueEndpoint, threads: int) -> None:
        self.cluster = cluster
        self.rank = rank
        self.endpoint = endpoint
        options = RpcBackendOptions(num_worker_threads=threads, rpc_timeout=30)
        self.agent = Agent(options, endpoint, FixedGroup(cluster.members), None, lambda _: None, lambda _: None)
        self.agent.handle(PythonCall, self._serve, inline=False)
        install(self.agent)
        self.agent.join(f"worker{rank}", rank, len(cluster.members), {}, 10)
        self.agent.open()

    @property
    def service(self) -> AutogradService:
        service: AutogradService = self.agent.extensions[AutogradService]
        return service

    def call(self, to: Worker, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(to, *args)` on `to`."""
        return pickling.loads(self.start(to, function, *args).wait())

    def start(self, to: Worker, function: Callable[..., Any], *args: Any) -> Call:
        """The same, without waiting."""
        payload = pickling.dumps((self.cluster.key_of(function), args))
        return self.agent.request(to.agent.info, PythonCall(), payload, hooked=True)

    @contextmanager
    def context(self) -> Iterator[int]:
        """An autograd context."""
        context_id = self.service.contexts.new().context_id
        try:
            yield context_id
        finally:
            self.service.release(context_id)

    def backward(self, context_id: int, *roots: torch.Tensor, retain_graph: bool = False, smart: bool = False) -> None:
        """A backward pass."""
        self.service.backward(context_id, list(roots), retain_graph, smart)

    def gradients(self, context_id: int) -> dict[torch.Tensor, torch.Tensor]:
        """The gradients here."""
        return self.service.contexts.get(context_id).gradients()

    def _serve(self, request: Request[PythonCall]) -> None:
        with request.context():
            key, args = pickling.loads(request.payload)
            request.reply(pickling.dumps(self.cluster.functions[key](self, *args)))


class Cluster:
    """`size` workers."""

    def __init__(self, size: int, threads: int = 2, seed: int = 0) -> None:
        self.network = Network(seed)
        endpoints = [QueueEndpoint(self.network) for _ in range(size)]
        self.members = [
            Member(WorkerInfo(f"worker{rank}", rank), endpoint.incarnation) for rank, endpoint in enumerate(endpoints)
        ]
        self.functions: dict[int, Callable[..., Any]] = {}
        self._keys = itertools.count()
        self.workers = [Worker(self, rank, endpoint, threads) for rank, endpoint in enumerate(endpoints)]

    def key_of(self, function: Callable[..., Any]) -> int:
        """A number to send instead of `function`."""
        key = next(self._keys)
        self.functions[key] = function
        return key

    def kill(self, victim: Worker) -> None:
        """End a worker without a word; the others are told by their transports."""
        del self.network.endpoints[victim.endpoint.incarnation]
        victim.service.close()
        victim.agent.close(0)
        for worker in self.workers:
            if worker is not victim:
                worker.endpoint.on_lost(victim.endpoint.incarnation, "killed")

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.service.close()
            worker.agent.close(1.0)

    def __enter__(self) -> list[Worker]:
        return self.workers

    def __exit__(self, *_: object) -> None:
        self.close()
