"""Brokered transport: a worker reaches all others through one broker, and listens nowhere.

The worker has two DEALERs, both connected to the broker's one ROUTER (`zrpc.transport.hub` has the frames): any thread
sends on the one, under its lock; the reading thread reads the other. Before it is ever read, the second one says hello,
so that the broker knows that it can be answered.

A connection to the broker that breaks is not made again: the broker's ROUTER drops what waited for it, so going on
would lose messages without a word. Every peer is then reported lost, and the broker, which sees the receiving
connection go, tells the others.

Workers of one host have links of their own (`zrpc.transport.local_links`), and pass the broker by. It tells of comings,
goings and losses as ever; what a worker that is gone has sent on its link is delivered before. Links take no more than
half of the files that this process may open: who uses a broker need not raise that limit.

A second thread, the watcher, reads the two sockets' monitors and drains the queue of what did not fit into the socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import zmq

from zrpc import finalizers
from zrpc.errors import PeerLostError
from zrpc.exception_text import log_error
from zrpc.transport import sockets
from zrpc.transport.credit import CreditLink
from zrpc.transport.hub import BROKER, RECEIVER, SENDER
from zrpc.transport.link_endpoint import LinkEndpoint
from zrpc.transport.socket_link import RelayLink, SocketLink
from zrpc.transport.watch import EVENTS, HANDSHAKE_FAILED, ConnectionState
from zrpc.wire.envelope import Buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials
    from zrpc.transport.endpoint import OnFrames, OnLost
    from zrpc.transport.inbox import Work
    from zrpc.transport.link import Link

log = logging.getLogger("zrpc")


OnControl = Callable[[list[Buffer]], None]
"""`on_control(frames)`: the broker itself sent a message. Runs on the reading thread: it must not block."""

OnBrokerLost = Callable[[str, bool], None]


def _ignore(*_: object) -> None:
    """Nobody listens yet."""


CREDIT_NBYTES = 64 << 20
"""What may be on the way to one peer that has not read it. It may lie in the broker, once for each worker that sends to
the same one."""


class BrokeredEndpoint(LinkEndpoint):
    """One worker's end of the brokered transport.

    Peers are known by `add_peer`; the membership calls it, and `lose_peer` or `remove_peer` when they are gone.

    Args:
        address: the broker's, `broker://host:port` or `tcp://host:port`.
        incarnation: this life of the worker.
        local: have links with workers of this host.
        busy_poll_s: see `Polling`.
        credentials: what it proves itself with, and whom it lets in; None: nothing, and anybody.

    Attributes:
        heard_at: when anything last came from the broker (`time.monotonic`).

    Raises:
        ConfigError: the address is not one, or its host is not known.
    """

    def __init__(
        self, address: str, incarnation: Incarnation, *, local: bool = False, busy_poll_s: float = 0.0,
        credentials: Credentials | None = None,
    ) -> None:  # fmt: skip
        self.address = address
        self._numeric_address = sockets.split_address(sockets.resolve(address))
        self._on_control: OnControl = _ignore
        self._on_broker_lost: OnBrokerLost = _ignore
        self.heard_at = time.monotonic()
        self._broker_lost: str | None = None
        self._connections_up = 0
        self._connection_state = ConnectionState()
        super().__init__(
            incarnation, self._make_receiver, local=local, is_thrifty=True, busy_poll_s=busy_poll_s, wake=[BROKER, b""],
            credentials=credentials,
        )  # fmt: skip
        self._poller = zmq.Poller()
        for sock in (self._watcher_end, self._sender_monitor, self._receiver_monitor):
            self._poller.register(sock, zmq.POLLIN)
        self._peers: set[Incarnation] = set()  # those who are there; owned by the lock
        self._deliver_lock = threading.Lock()  # owns what came before `start`
        self._early: list[tuple[Incarnation, list[Buffer] | str]] = []
        self._started = False
        self._on_frames: OnFrames
        self._on_lost: OnLost

    # ---- Endpoint ---------------------------------------------------------------------------------------------------

    def local_ports(self) -> set[int]:
        """See `fork.Connected`. It listens on none."""
        return set()

    def remote_addresses(self) -> set[tuple[str, int]]:
        """See `fork.Connected`: the broker's."""
        return {self._numeric_address}

    def start(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        """Begin to deliver; see `Endpoint.start`. What came since `open` is delivered before this returns."""
        self.open()
        with self._deliver_lock:
            self._on_frames, self._on_lost = on_frames, on_lost
            early, self._early = self._early, []
            for source, what in early:
                work = self._hand_over(source, what)
                if work is not None:
                    work()
            self._started = True

    def watch(self, peer: Incarnation) -> None:
        """See `Endpoint.watch`: the broker tells of every loss."""

    # ---- for the membership -----------------------------------------------------------------------------------------

    def tell(self, on_control: OnControl, on_broker_lost: OnBrokerLost) -> None:
        """Say who is to be told. To be called once, before `open`.

        Args:
            on_control: takes the broker's own messages.
            on_broker_lost: is told when the broker is gone, why, and whether it refused this worker. Any thread; it
                must not block.
        """
        self._on_control, self._on_broker_lost = on_control, on_broker_lost

    def open(self) -> None:
        """Begin to read: the broker's messages are taken from now on, the workers' kept until `start`. Idempotent.

        Raises:
            LimitError: the system gives no thread.
        """
        self._begin()

    def tell_broker(self, frames: Sequence[Buffer]) -> None:
        """Send a message to the broker itself. Raises what `send` raises."""
        if self._broker_lost is not None:
            raise self._refusal(BROKER)
        try:
            self._to_broker.send(frames, BROKER)
        except PeerLostError as error:
            raise self._refusal(BROKER) from error
        self.inbox.polling.give_way()

    def is_connected(self) -> bool:
        """Whether both connections to the broker are made."""
        return self._connections_up == 2

    def add_peer(self, peer: Incarnation) -> None:
        """A worker can be sent to from now on."""
        with self._lock:
            self._peers.add(peer)

    def remove_peer(self, peer: Incarnation, reason: str) -> bool:
        """A worker cannot be sent to any more; false if that was known already."""
        if self._local_links is not None and self.inbox.is_read_here:
            with self.inbox.taking_several():  # what it has sent on its local link comes before that
                for frames in self._local_links.forget(peer):
                    self._deliver(peer, frames)
        with self._lock:
            known = peer in self._peers
            self._peers.discard(peer)
            link = self._links.pop(peer, None)
            self._gone.note(peer, reason)
            self._owed.pop(peer, None)
        if link is not None:
            link.close(linger_s=0.0)
        return known

    def lose_peer(self, peer: Incarnation, reason: str) -> None:
        """The same for one that is lost: `on_lost` is told, once."""
        if self.remove_peer(peer, reason):
            self._deliver(peer, reason)

    def lose_broker(self, reason: str, *, is_refused: bool = False) -> None:
        """The broker is gone, or lets this worker in no more (`is_refused`), and every peer with it. Idempotent."""
        with self._lock:
            if self._closed or self._broker_lost is not None:
                return
            self._broker_lost = reason
            peers = list(self._peers)
            self._wake(self._reader_wake)
        for peer in peers:
            self.lose_peer(peer, reason)
        self._on_broker_lost(reason, is_refused)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _make_receiver(self, context: sockets.Context) -> sockets.Socket:
        sender, self._sender_monitor = self._connect(context, SENDER + self.incarnation)
        receiver, self._receiver_monitor = self._connect(context, RECEIVER + self.incarnation)
        receiver.send(b"")
        self._to_broker = SocketLink(sender, self._on_queued)
        return receiver

    def _open(self, peer: Incarnation) -> Link:
        with self._lock:
            if self._closed or self._broker_lost is not None or peer not in self._peers:
                raise self._refusal(peer)
            link = self._links.get(peer)
            if link is None and self._local_links is not None:
                link = self._local_links.connect(peer)
            link = self._links[peer] = link or CreditLink(RelayLink(peer, self._to_broker), CREDIT_NBYTES)
            return link

    def _connect(self, context: sockets.Context, identity: bytes) -> tuple[sockets.Socket, sockets.Socket]:
        """A DEALER connected to the broker, and its monitor."""
        sock = sockets.make_socket(context, zmq.DEALER, identity=identity)
        monitor = sockets.make_monitor(context, sock, EVENTS | zmq.EVENT_MONITOR_STOPPED)
        sockets.connect(sock, self.address, self._credentials)
        return sock, monitor

    def _close_links(self, links: Sequence[Link], deadline: float) -> None:
        if can_flush := self.is_connected() and self._broker_lost is None:
            self._to_broker.flush(deadline - time.monotonic())
        self._to_broker.close(deadline - time.monotonic() if can_flush else 0.0)
        super()._close_links(links, deadline)

    def _close_monitors(self) -> None:
        self._sender_monitor.close()
        self._receiver_monitor.close()

    def _why_gone(self, peer: bytes) -> str:
        return self._broker_lost or super()._why_gone(peer)

    def _is_over(self) -> bool:
        return self._closed or self._broker_lost is not None

    def _take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        if self._is_over() or (source == BROKER and len(frames) == 1 and not frames[0]):  # that only wakes the reader
            return None
        if not self.inbox.is_on_link:
            self.heard_at = time.monotonic()
        if source != BROKER:
            return None if self._is_mark(source, frames) else self._deliver(source, frames)
        try:
            self._on_control(frames)
        except Exception as error:  # whatever one message does, the next one is read
            finalizers.defer(partial(log_error, log, "a message of the broker was not carried out", error=error))
        return None

    def _deliver(self, source: Incarnation, what: list[Buffer] | str) -> Work | None:
        """Hand over a worker's message, or the reason why it is lost; keep it if nobody takes it yet."""
        if not self._started:
            with self._deliver_lock:
                if not self._started:
                    self._early.append((source, what))
                    return None
        return self._hand_over(source, what)

    def _hand_over(self, source: Incarnation, what: list[Buffer] | str) -> Work | None:
        if isinstance(what, str):
            self._on_lost(source, what)
            return None
        return self._on_frames(source, what)

    def _wait_sent(self, deadline: float) -> None:
        """Wait until the closed sender has sent all, up to `deadline`; see `ConnectionWatch.wait_closed`."""
        while (left_s := deadline - time.monotonic()) > 0 and self._sender_monitor.poll(int(left_s * 1000) + 1):
            if sockets.receive_event(self._sender_monitor) == zmq.EVENT_MONITOR_STOPPED:
                return

    def _watch_once(self) -> None:
        ready = dict(self._poller.poll(self._drain_interval_ms))
        if self._watcher_end in ready:
            self._watcher_end.recv_multipart()
        for monitor in (self._sender_monitor, self._receiver_monitor):
            if monitor in ready:
                self._on_monitor(sockets.receive_event(monitor))

    def _on_monitor(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.heard_at = time.monotonic()
            self._connections_up += 1
        elif event == zmq.EVENT_DISCONNECTED and self._connections_up:
            self.lose_broker(f"the connection to the broker at {self.address} broke")
        elif event in (*HANDSHAKE_FAILED, zmq.EVENT_CONNECTED) and (
            reason := self._connection_state.on_event(event, time.monotonic())
        ):
            self.lose_broker(f"the broker at {self.address} refused this worker: {reason}", is_refused=True)
