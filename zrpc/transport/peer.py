"""Brokerless transport: every worker listens on one ROUTER and connects one DEALER to each peer it talks to.

Sockets are one-way. The ROUTER is only read, by the reading thread; a DEALER is only sent on, by any thread, under
its lock. An answer travels on the answerer's own DEALER. So a call needs no hop through an I/O thread on its way out,
and no socket is ever polled for both.

A DEALER's routing id is its worker's incarnation: the ROUTER's source frame says who sent, and two lives of one worker
are never mistaken for each other. Connections are made when the first message is sent. Workers of one host have links
of their own (`zrpc.transport.local_links`) instead, where both may have them.

A second thread, the watcher, reads the connections' monitors, drains queues, and declares peers lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import zmq

from zrpc import threads
from zrpc.errors import AgentClosedError, ConfigError, PeerLostError
from zrpc.ids import EndedLives
from zrpc.transport import descriptors, fork, io_thread, sockets
from zrpc.transport.inbox import READERS, Inbox, Work
from zrpc.transport.local_links import FILES_PER_PEER, LocalLink, LocalLinks
from zrpc.transport.outbox import Outbox
from zrpc.transport.watch import EVENTS, ConnectionWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.endpoint import OnFrames, OnLost
    from zrpc.wire.envelope import Buffer

DRAIN_INTERVAL_MS = 2
JOIN_MIN_S = 0.1
"""So long, at least, a closing endpoint waits for its threads: one that does not work ends at once."""
_WAKE = b""


class PeerEndpoint:
    """One worker's end of the brokerless transport.

    Args:
        incarnation: this life of the worker.
        bind: address to listen on, such as `tcp://127.0.0.1:0`.
        local: have links with workers of this host.
        busy_poll_s: see `Polling`.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    credit_nbytes = 512 << 20
    """ZeroMQ holds references to memory that the message's sender holds as well: this only bounds answers."""

    def __init__(self, incarnation: Incarnation, bind: str, *, local: bool = False, busy_poll_s: float = 0.0) -> None:
        self.incarnation = incarnation
        self._context, carrier = io_thread.make_context()
        router = sockets.make_socket(self._context, zmq.ROUTER, heartbeats=False)
        # A peer connects again while this process stands still, for which the connection before is still there: without
        # this the new one would be taken in and never read.
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.ROUTING_ID, incarnation)  # so that it can be seen which life listens: `has_ended`
        try:
            self.address = sockets.bind(router, bind)
        except BaseException:
            router.close()
            self._context.term()
            raise
        router.bind("inproc://wake-reader")
        self._links = LocalLinks.make(incarnation) if local else None
        if self._links is not None:
            self._links.tell(self._on_broken)
        self.inbox = Inbox(router, self._take, lambda: self._closed, carrier, self.interrupt, self._links, busy_poll_s)
        self._reader_wake = self._wake_socket("inproc://wake-reader", zmq.DEALER)
        watcher_end = self._context.socket(zmq.PAIR)
        watcher_end.bind("inproc://wake-watcher")
        self._watcher_wake = self._wake_socket("inproc://wake-watcher", zmq.PAIR)
        self._watch: ConnectionWatch[Incarnation] = ConnectionWatch(watcher_end)
        self._watcher_end = watcher_end
        self._lock = threading.Lock()  # owns the tables below and the wake sockets
        self._addresses: dict[Incarnation, str] = {}
        self._outboxes: dict[Incarnation, Outbox | LocalLink] = {}
        self._new_monitors: list[tuple[Incarnation, sockets.Socket]] = []
        self._lost = EndedLives()
        self._clogged: set[Incarnation] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._on_frames: OnFrames
        self._on_lost: OnLost
        fork.drop_in_children(self)

    def local_ports(self) -> set[int]:
        """See `fork.Connected`."""
        return {sockets.split_address(self.address)[1]}

    def remote_addresses(self) -> set[tuple[str, int]]:
        """See `fork.Connected`."""
        return {sockets.split_address(address) for address in self._addresses.values()}

    def start(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        """Begin to read; see `Endpoint.start`."""
        self._on_frames, self._on_lost = on_frames, on_lost
        readers = [(self.inbox.run, f"zrpc-reader-{number}") for number in range(READERS)]
        for target, name in (*readers, (self._watch_loop, "zrpc-watcher")):
            self._threads.append(threads.start(target, name))

    def connect(self, peer: Incarnation, address: str) -> None:
        """Say where `peer` listens; the connection is made with the first message to it."""
        with self._lock:
            self._addresses.setdefault(peer, address)

    def disconnect(self, peer: Incarnation) -> None:
        """Forget a peer that said goodbye; what was sent to it may still leave."""
        with self._lock:
            self._addresses.pop(peer, None)
            self._lost.note(peer, "it left the group")
            outbox = self._outboxes.pop(peer, None)
        if isinstance(outbox, LocalLink):
            outbox.close()
        elif outbox is not None:
            outbox.close(linger_ms=1_000)

    def watch(self, peer: Incarnation) -> None:
        """Connect to `peer` now; see `Endpoint.watch`."""
        if peer in self._outboxes:
            return
        try:
            self._open(peer)
        except PeerLostError:
            self._on_lost(peer, self._lost.get(peer, "it is not connected"))

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        """Send one message; see `Endpoint.send`."""
        outbox = self._outboxes.get(to) or self._open(to)
        if type(outbox) is LocalLink:
            self._send_local(to, outbox, frames)
            return
        try:
            if not outbox.send(frames):
                with self._lock:
                    if to not in self._clogged:
                        self._clogged.add(to)
                        self._wake_watcher()
        except zmq.ZMQError as error:
            raise self._gone(to) from error
        self.inbox.polling.give_way()

    def _send_local(self, to: Incarnation, link: LocalLink, frames: Sequence[Buffer]) -> None:
        try:
            link.send(frames)
        except PeerLostError as error:
            raise self._gone(to) from error
        self.inbox.polling.give_way()

    def is_local(self, to: Incarnation) -> bool:
        """See `Endpoint.is_local`."""
        return self._links is not None and type(self._outboxes.get(to) or self._open(to)) is LocalLink

    def interrupt(self) -> None:
        """See `Endpoint.interrupt`."""
        with self._lock, contextlib.suppress(zmq.Again):
            if not self._closed:
                self._reader_wake.send(_WAKE, zmq.NOBLOCK)

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        """Stop; see `Endpoint.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._reader_wake.send(_WAKE)
            self._wake_watcher()
        deadline = time.monotonic() + flush_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                threads.join(thread, max(JOIN_MIN_S, deadline - time.monotonic()))  # a reader may be at work
        if not at_exit:
            self.inbox.end()
        elif self._links is not None:
            self._links.hide()
        with self._lock:
            outboxes, self._outboxes = list(self._outboxes.values()), {}
            monitors, self._new_monitors = self._new_monitors, []
        for outbox in outboxes:
            outbox.flush(deadline - time.monotonic())
        for outbox in outboxes:
            if isinstance(outbox, LocalLink):
                outbox.close()
            else:
                outbox.close(linger_ms=max(0, int((deadline - time.monotonic()) * 1000)))
        if at_exit:  # the peers watch their own connections, to the sockets that this one receives on
            for peer, monitor in monitors:
                self._watch.add(peer, monitor)
            self._watch.wait_closed(deadline)
            sockets.keep_to_the_end(self)
            return
        self._watch.close()
        for _, monitor in monitors:
            monitor.close()
        self.inbox.close()
        for wake in (self._watcher_end, self._watcher_wake, self._reader_wake):
            wake.close()
        self._context.term()

    def _wake_socket(self, address: str, kind: int) -> sockets.Socket:
        sock: sockets.Socket = self._context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(address)
        return sock

    def _wake_watcher(self) -> None:
        """Make the watcher look at its tables. Call it under the lock: it must not block."""
        with contextlib.suppress(zmq.Again):  # it has been woken often enough
            self._watcher_wake.send(_WAKE, zmq.NOBLOCK)

    def _gone(self, peer: Incarnation) -> Exception:
        if self._closed:
            return AgentClosedError("this worker has shut down its transport")
        return PeerLostError(f"the peer is gone: {self._lost.get(peer, 'it is not connected')}")

    def _open(self, peer: Incarnation) -> Outbox | LocalLink:
        """Make the connection to `peer`."""
        with self._lock:
            existing = self._outboxes.get(peer)
            if existing is not None:
                return existing
            address = self._addresses.get(peer)
            if self._closed or peer in self._lost or address is None:
                raise self._gone(peer)
            if self._links is not None:
                descriptors.check_room(FILES_PER_PEER)
                link = self._links.connect(peer)
                if link is not None:
                    self._outboxes[peer] = link
                    return link
            sock = sockets.make_socket(self._context, zmq.DEALER, identity=self.incarnation, heartbeats=False)
            try:
                monitor = sockets.make_monitor(self._context, sock, EVENTS)
            except zmq.ZMQError:
                sock.close()
                raise
            try:
                sockets.connect(sock, address)
            except ConfigError as error:
                self._lost.note(peer, f"its address cannot be used: {error}")
                sock.disable_monitor()  # its last word must be sent while somebody is there to read it
                sock.close()
                monitor.close()
                raise self._gone(peer) from error
            outbox = self._outboxes[peer] = Outbox(sock)
            self._new_monitors.append((peer, monitor))
            self._wake_watcher()
            return outbox

    def _take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        if self._closed or (len(frames) == 1 and not frames[0]):  # it only wakes the reader
            return None
        return self._on_frames(source, frames)

    def _watch_loop(self) -> None:
        threads.keep_running(self._watch_once, lambda: self._closed)

    def _watch_once(self) -> None:
        self._watch.poll(DRAIN_INTERVAL_MS if self._clogged else None, self._declare_lost)
        with self._lock:
            added, self._new_monitors = self._new_monitors, []
            clogged, self._clogged = self._clogged, set()  # a sender that finds its queue anew puts it back
            queues = [(peer, outbox) for peer in clogged if isinstance(outbox := self._outboxes.get(peer), Outbox)]
        for peer, monitor in added:
            self._watch.add(peer, monitor)
        still = [peer for peer, outbox in queues if not outbox.drain()]
        with self._lock:
            self._clogged.update(still)

    def _declare_lost(self, peer: Incarnation, reason: str) -> None:
        with self._lock:
            outbox = self._outboxes.pop(peer, None)
            if outbox is None:
                return
            self._addresses.pop(peer, None)
            self._lost.note(peer, reason)
        if isinstance(outbox, LocalLink):
            outbox.close()
        else:
            outbox.close(linger_ms=0)
        self._on_lost(peer, reason)

    def _on_broken(self, peer: Incarnation, reason: str) -> None:
        """The link to `peer` is closed at its end: what it has sent before comes first. For the thread that reads."""
        assert self._links is not None
        with self.inbox.taking_several():
            for frames in self._links.forget(peer):
                self._take(peer, frames)
        self._declare_lost(peer, reason)
