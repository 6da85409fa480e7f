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

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from zrpc import finalizers, threads
from zrpc.errors import AgentClosedError, PeerLostError
from zrpc.exception_text import log_error
from zrpc.ids import EndedLives
from zrpc.transport import fork, io_thread, sockets
from zrpc.transport.hub import BROKER, RECEIVER, SENDER
from zrpc.transport.inbox import READERS, Inbox, Work
from zrpc.transport.local_links import LocalLink, LocalLinks
from zrpc.transport.outbox import Outbox
from zrpc.wire.envelope import Buffer

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.transport.endpoint import OnFrames, OnLost

log = logging.getLogger("zrpc")

DRAIN_INTERVAL_MS = 2
JOIN_MIN_S = 0.1
"""So long, at least, a closing endpoint waits for its threads: one that does not work ends at once."""
EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_WAKE_READER = "inproc://wake-reader"
_WAKE_WATCHER = "inproc://wake-watcher"

OnControl = Callable[[list[Buffer]], None]
"""`on_control(frames)`: the broker itself sent a message. Runs on the reading thread: it must not block."""


def _ignore(_: object) -> None:
    """Nobody listens yet."""


class BrokeredEndpoint:
    """One worker's end of the brokered transport.

    Peers are known by `add_peer`; the membership calls it, and `lose_peer` or `remove_peer` when they are gone.

    Args:
        address: the broker's, `broker://host:port` or `tcp://host:port`.
        incarnation: this life of the worker.
        local: have links with workers of this host.
        busy_poll_s: see `Polling`.

    Attributes:
        heard_at: when anything last came from the broker (`time.monotonic`).

    Raises:
        ConfigError: the address is not one, or its host is not known.
    """

    credit_nbytes = 64 << 20
    """What is on the way may lie in the broker, once for each worker that sends to the same one."""

    def __init__(
        self, address: str, incarnation: Incarnation, *, local: bool = False, busy_poll_s: float = 0.0
    ) -> None:
        self.incarnation = incarnation
        self.address = address
        self._numeric_address = sockets.split_address(sockets.resolve(address))
        self._on_control: OnControl = _ignore
        self._on_broker_lost: Callable[[str], None] = _ignore
        self.heard_at = time.monotonic()
        self._context, carrier = io_thread.make_context()
        try:
            sender, self._sender_monitor = self._connect(SENDER + incarnation)
            receiver, self._receiver_monitor = self._connect(RECEIVER + incarnation)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        receiver.send(b"")
        receiver.bind(_WAKE_READER)
        self._outbox = Outbox(sender)
        self._links = LocalLinks.make(incarnation, is_thrifty=True) if local else None
        self.inbox = Inbox(receiver, self._take, self._is_over, carrier, self.interrupt, self._links, busy_poll_s)
        self._watcher_end = self._context.socket(zmq.PAIR)
        self._watcher_end.bind(_WAKE_WATCHER)
        self._reader_wake = self._wake_socket(_WAKE_READER, zmq.DEALER)
        self._watcher_wake = self._wake_socket(_WAKE_WATCHER, zmq.PAIR)
        self._lock = threading.Lock()  # owns what follows and the wake sockets
        self._peers: dict[Incarnation, LocalLink | None] = {}  # those who are there; None: the broker relays
        self._untried: set[Incarnation] = set()  # those of them that nothing was sent to yet
        self._gone = EndedLives()
        self._broker_lost: str | None = None
        self._connections_up = 0
        self._clogged = False
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._deliver_lock = threading.Lock()  # owns what came before `start`
        self._early: list[tuple[Incarnation, list[Buffer] | str]] = []
        self._started = False
        self._on_frames: OnFrames
        self._on_lost: OnLost
        fork.drop_in_children(self)

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

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        """Send one message to a worker; see `Endpoint.send`."""
        link = self._link_to(to)
        if link is None:
            self._send(to, frames)
            return
        try:
            link.send(frames)
        except PeerLostError as error:
            raise self._refusal(to) from error
        self.inbox.polling.give_way()

    def is_local(self, to: Incarnation) -> bool:
        """See `Endpoint.is_local`."""
        return self._links is not None and self._link_to(to) is not None

    def watch(self, peer: Incarnation) -> None:
        """See `Endpoint.watch`: the broker tells of every loss."""

    def interrupt(self) -> None:
        """See `Endpoint.interrupt`."""
        with self._lock:
            if not self._closed:
                self._wake(self._reader_wake)

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        """Stop; see `Endpoint.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake(self._reader_wake)
            self._wake(self._watcher_wake)
        deadline = time.monotonic() + flush_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                threads.join(thread, max(JOIN_MIN_S, deadline - time.monotonic()))  # a reader may be at work
        if can_flush := self.is_connected() and self._broker_lost is None:
            self._outbox.flush(deadline - time.monotonic())
        self._outbox.close(linger_ms=max(0, int((deadline - time.monotonic()) * 1000)) if can_flush else 0)
        for link in list(self._peers.values()):
            if link is not None:
                link.flush(deadline - time.monotonic())
                link.close()
        if at_exit:  # the broker takes this worker for lost when the connection that it receives on breaks
            self._wait_sent(deadline)
            if self._links is not None:
                self._links.hide()
            sockets.keep_to_the_end(self)
            return
        self.inbox.close()
        wakes = (self._watcher_end, self._reader_wake, self._watcher_wake)
        for sock in (*wakes, self._sender_monitor, self._receiver_monitor):
            sock.close()
        self._context.term()

    # ---- for the membership -----------------------------------------------------------------------------------------

    def tell(self, on_control: OnControl, on_broker_lost: Callable[[str], None]) -> None:
        """Say who is to be told. To be called once, before `open`.

        Args:
            on_control: takes the broker's own messages.
            on_broker_lost: takes the reason when the broker is gone. Any thread; it must not block.
        """
        self._on_control, self._on_broker_lost = on_control, on_broker_lost

    def open(self) -> None:
        """Begin to read: the broker's messages are taken from now on, the workers' kept until `start`. Idempotent.

        Raises:
            LimitError: the system gives no thread.
        """
        with self._lock:
            if self._threads or self._closed:
                return
            readers = [(self.inbox.run, f"zrpc-reader-{number}") for number in range(READERS)]
        for target, name in (*readers, (self._watch_loop, "zrpc-watcher")):
            self._threads.append(threads.start(target, name))

    def tell_broker(self, frames: Sequence[Buffer]) -> None:
        """Send a message to the broker itself. Raises what `send` raises."""
        self._send(BROKER, frames)

    def is_connected(self) -> bool:
        """Whether both connections to the broker are made."""
        return self._connections_up == 2

    def add_peer(self, peer: Incarnation) -> None:
        """A worker can be sent to from now on."""
        with self._lock:
            if peer not in self._peers:
                self._peers[peer] = None
                if self._links is not None:
                    self._untried.add(peer)

    def remove_peer(self, peer: Incarnation, reason: str) -> bool:
        """A worker cannot be sent to any more; false if that was known already."""
        self._deliver_last_words(peer)
        with self._lock:
            known = peer in self._peers
            link = self._peers.pop(peer, None)
            self._untried.discard(peer)
            self._gone.note(peer, reason)
        if link is not None:
            link.close()
        return known

    def lose_peer(self, peer: Incarnation, reason: str) -> None:
        """The same for one that is lost: `on_lost` is told, once."""
        if self.remove_peer(peer, reason):
            self._deliver(peer, reason)

    def lose_broker(self, reason: str) -> None:
        """The broker is gone, and every peer with it. Idempotent."""
        with self._lock:
            if self._closed or self._broker_lost is not None:
                return
            self._broker_lost = reason
            peers = list(self._peers)
            self._wake(self._reader_wake)
        for peer in peers:
            self.lose_peer(peer, reason)
        self._on_broker_lost(reason)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _link_to(self, peer: Incarnation) -> LocalLink | None:
        """The link to `peer`, which is made where nothing was sent to it yet; None: the broker relays."""
        try:
            link = self._peers[peer]
        except KeyError:
            raise self._refusal(peer) from None
        if link is None and peer in self._untried:
            with self._lock:
                if peer in self._untried and self._links is not None and not self._closed:
                    self._untried.discard(peer)
                    self._peers[peer] = self._links.connect(peer)
                link = self._peers.get(peer)
        return link

    def _connect(self, identity: bytes) -> tuple[sockets.Socket, sockets.Socket]:
        """A DEALER connected to the broker, and its monitor."""
        sock = sockets.make_socket(self._context, zmq.DEALER, identity=identity)
        monitor = sockets.make_monitor(self._context, sock, EVENTS)
        sockets.connect(sock, self.address)
        return sock, monitor

    def _wake_socket(self, address: str, kind: int) -> sockets.Socket:
        sock: sockets.Socket = self._context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(address)
        return sock

    def _wake(self, sock: sockets.Socket) -> None:
        """Make the thread at the other end look around, if it still runs. Call it under the lock."""
        with contextlib.suppress(zmq.Again):
            sock.send_multipart([BROKER, b""], zmq.NOBLOCK)

    def _send(self, to: bytes, frames: Sequence[Buffer]) -> None:
        if self._broker_lost is not None:
            raise self._refusal(to)
        try:
            sent = self._outbox.send(frames, to)
        except zmq.ZMQError as error:
            raise self._refusal(to) from error
        if not sent:
            with self._lock:
                self._clogged = True
                if not self._closed:
                    self._wake(self._watcher_wake)
        self.inbox.polling.give_way()

    def _refusal(self, to: bytes) -> Exception:
        if self._closed:
            return AgentClosedError("this worker has shut down its transport")
        reason = self._broker_lost or self._gone.get(to, "it is not connected")
        return PeerLostError(f"the peer is gone: {reason}")

    def _is_over(self) -> bool:
        return self._closed or self._broker_lost is not None

    def _take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        if self._is_over() or (source == BROKER and len(frames) == 1 and not frames[0]):  # that only wakes the reader
            return None
        if not self.inbox.is_on_link:
            self.heard_at = time.monotonic()
        if source != BROKER:
            return self._deliver(source, frames)
        try:
            self._on_control(frames)
        except Exception as error:  # whatever one message does, the next one is read
            finalizers.defer(partial(log_error, log, "a message of the broker was not carried out", error=error))
        return None

    def _deliver_last_words(self, peer: Incarnation) -> None:
        """The broker says that a worker is gone: what it has sent on its link comes before that."""
        if self._links is not None and self.inbox.is_read_here:
            with self.inbox.taking_several():
                for message in self._links.forget(peer):
                    self._deliver(peer, message)

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
            if recv_monitor_message(self._sender_monitor)["event"] == zmq.EVENT_MONITOR_STOPPED:
                return

    def _watch_loop(self) -> None:
        poller = zmq.Poller()
        for sock in (self._watcher_end, self._sender_monitor, self._receiver_monitor):
            poller.register(sock, zmq.POLLIN)
        threads.keep_running(partial(self._watch_once, poller), self._is_over)

    def _watch_once(self, poller: zmq.Poller) -> None:
        ready = dict(poller.poll(DRAIN_INTERVAL_MS if self._clogged else None))
        if self._watcher_end in ready:
            self._watcher_end.recv_multipart()
        for monitor in (self._sender_monitor, self._receiver_monitor):
            if monitor in ready:
                self._on_monitor(int(recv_monitor_message(monitor)["event"]))
        if self._clogged:
            self._clogged = False
            if not self._outbox.drain():
                self._clogged = True

    def _on_monitor(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.heard_at = time.monotonic()
            self._connections_up += 1
        elif self._connections_up:
            self.lose_broker(f"the connection to the broker at {self.address} broke")
