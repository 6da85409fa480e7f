"""Agents of one process that send each other messages through memory, and lose those that a test picks."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from tests.unit.staging.fake import FakeAccelerator
from tests.unit.wire.travel import received
from zrpc.agent.agent import Agent
from zrpc.config import RpcBackendOptions
from zrpc.errors import AgentClosedError, LimitError, PeerLostError
from zrpc.ids import Incarnation, WorkerInfo, new_incarnation
from zrpc.membership.group import Member
from zrpc.transport.chunks import MAGIC
from zrpc.wire.envelope import Buffer, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zrpc.membership.group import OnJoined, OnLeft
    from zrpc.transport.endpoint import OnFrames, OnLost
    from zrpc.wire.messages import Message

WAIT_S = 20.0

READER = "reader"
Parcel = tuple[Incarnation, list[Buffer]]


class Network:
    """Where endpoints are found.

    Attributes:
        loses: asked for each message; true: it does not arrive.
    """

    def __init__(self) -> None:
        self.endpoints: dict[Incarnation, MemoryEndpoint] = {}
        self.loses: Callable[[Message], bool] = lambda message: False


class ReadElsewhere:
    """An inbox that a thread of its own reads, and no caller."""

    is_read_by_caller = False
    is_reader_here = False
    can_work = False
    must_hand_on = False
    serves_queue_here = False
    num_sent = 0

    def tell(self, on_queue_empty: Callable[[], None], on_callers_left: Callable[[], None]) -> None:
        """Nothing is left behind by callers, as none reads."""

    @property
    def is_read_here(self) -> bool:
        return threading.current_thread().name == READER

    def wait_for(self, wanted: Any, deadline: float | None, is_serving: Callable[[], bool] = lambda: False) -> None:
        wanted.block(deadline)

    def wake(self, wanted: Any) -> None:
        """No caller reads."""


class MemoryEndpoint:
    """An `Endpoint` whose messages travel through a queue, read by a thread of its own.

    Attributes:
        watched: whom it was to watch.
        watched_on: on which threads, by their names.
        num_refused: how often it cannot watch from now on.
        num_read: how many messages were taken in.
    """

    def __init__(self, network: Network) -> None:
        self.incarnation = new_incarnation()
        self.inbox = ReadElsewhere()
        self.is_encrypted = False
        self.watched: list[Incarnation] = []
        self.watched_on: list[str] = []
        self.num_refused = 0
        self.num_read = 0
        self._network = network
        self._queue: SimpleQueue[Parcel | None] = SimpleQueue()
        self._gone: set[Incarnation] = set()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._on_lost: OnLost
        network.endpoints[self.incarnation] = self

    def start(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        self._on_lost = on_lost

        def read() -> None:
            while (parcel := self._queue.get()) is not None:
                on_frames(*parcel)
                self.num_read += 1

        self._thread = threading.Thread(target=read, name=READER)
        self._thread.start()

    def meet(self, peer: Incarnation) -> None:
        """See `Endpoint`."""

    def queued_nbytes(self, to: Incarnation) -> int:
        return 0

    def release(self) -> None:
        """See `Endpoint`."""

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        if self._closed:
            raise AgentClosedError("closed")
        target = self._network.endpoints.get(to)
        if target is None or to in self._gone:
            raise PeerLostError("gone")
        is_chunk = frames[0][:1] == bytes([MAGIC])
        if is_chunk or not self._network.loses(decode(frames, lambda descriptor: b"").message):
            target.deliver(self.incarnation, received(frames))

    def deliver(self, source: Incarnation, frames: list[Buffer]) -> None:
        """Let a message of `source` arrive."""
        self._queue.put((source, frames))

    def lose(self, peer: Incarnation, reason: str) -> None:
        """Declare `peer` lost."""
        self._gone.add(peer)
        self._on_lost(peer, reason)

    def watch(self, peer: Incarnation) -> None:
        if self.num_refused:
            self.num_refused -= 1
            raise LimitError("no more files")
        self.watched_on.append(threading.current_thread().name)
        self.watched.append(peer)

    def interrupt(self) -> None:
        """Nobody reads until something comes."""

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        self._closed = True
        self._network.endpoints.pop(self.incarnation, None)
        self._queue.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


class MemoryGroup:
    """A `Group` whose members a test names.

    Attributes:
        members: who is here when somebody joins.
        newcomers: who is found by the next `refresh`.
        refreshes: how often was looked for newcomers.
        left: whether this worker has said goodbye.
        lingered: whether it has waited for the others before that.
    """

    on_joined: OnJoined
    on_left: OnLeft

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.newcomers: list[Member] = []
        self.refreshes = 0
        self.left = False
        self.lingered = False

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        self.on_joined, self.on_left = on_joined, on_left

    def join(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        incarnation: Incarnation,
        card: dict[str, Any],
        timeout_s: float,
    ) -> tuple[Member, list[Member]]:
        return next(member for member in self.members if member.incarnation == incarnation), self.members

    def note_lost(self, incarnation: Incarnation) -> None:
        pass

    def refresh(self) -> None:
        self.refreshes += 1
        newcomers, self.newcomers = self.newcomers, []
        for member in newcomers:
            self.on_joined(member)

    def linger(self, timeout_s: float) -> None:
        self.lingered = True

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        self.left = True


class Worker:
    """An agent with its fake transport and membership."""

    def __init__(
        self, network: Network, name: str, rank: int, options: RpcBackendOptions | None = None,
        *, checks_answers: bool = False,
    ) -> None:  # fmt: skip
        self.options = options or RpcBackendOptions(num_worker_threads=4)
        self.endpoint = MemoryEndpoint(network)
        self.group = MemoryGroup([])
        self.info = WorkerInfo(name, rank, self.endpoint.incarnation)
        self.connected: list[Member] = []
        self.disconnected: list[Incarnation] = []
        self.accelerator = FakeAccelerator(rank)
        self.agent = Agent(
            self.options, self.endpoint, self.group, None, self.connected.append, self.disconnected.append,
            open_accelerator=lambda: self.open_accelerator(), checks_answers=checks_answers,
        )  # fmt: skip

    def open_accelerator(self) -> FakeAccelerator:
        """What initializes its devices."""
        return self.accelerator

    def member(self, **card: Any) -> Member:
        return Member(self.info, self.endpoint.incarnation, card)

    def join(self, members: list[Member], world_size: int | None) -> None:
        self.group.members = members
        self.agent.join(self.info.name, self.info.id, world_size, {}, WAIT_S)


@contextmanager
def workers(
    *names: str,
    threads: int = 4,
    dynamic: bool = False,
    open_them: bool = True,
    network: Network | None = None,
    checks_answers: bool = False,
) -> Iterator[list[Worker]]:
    """Workers that know each other, closed in the end."""
    net = network or Network()
    options = [RpcBackendOptions(num_worker_threads=threads) for _ in names]
    made = [Worker(net, name, rank, options[rank], checks_answers=checks_answers) for rank, name in enumerate(names)]
    members = [worker.member() for worker in made]
    try:
        for worker in made:
            worker.join(members, None if dynamic else len(made))
        for worker in made:
            if open_them:
                worker.agent.open()
        yield made
    finally:
        for worker in made:
            worker.agent.close(5.0)
