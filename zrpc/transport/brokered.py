"""Brokered transport: a worker reaches all others through one broker, and listens nowhere.

The worker has two DEALERs, both connected to the broker's one ROUTER (`zrpc.transport.identities`): any thread
sends on the one, under its lock; the reading thread reads the other. Before it is ever read, the second one says hello,
so that the broker knows that it can be answered.

A connection to the broker that breaks may have lost messages both ways. So it is not silently made again: what others
are to be sent through it is refused (`NotConnectedError`), those who wait for answers are told (`on_break`), and the
watcher looks for a broker (`zrpc.transport.relaying`). When that has the group together, the membership says so
(`resume`). If there is none in time every peer is reported lost. A broker that lives, and sees a worker's receiving
connection go, takes it for lost and tells the others.

Workers of one host have links of their own (`zrpc.transport.local_links`), and pass the broker by. It tells of comings,
goings and losses as ever; what a worker that is gone has sent on its link is delivered before. Links take no more than
half of the files that this process may open: who uses a broker need not raise that limit. While there is no broker, a
worker of this host whose link is closed is lost.

A second thread, the watcher, reads the two sockets' monitors and drains the queue of what did not fit into the socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from zrpc import finalizers
from zrpc.errors import NotConnectedError, PeerLostError
from zrpc.exception_text import log_error
from zrpc.transport import sockets
from zrpc.transport.broker_connection import BrokerConnection
from zrpc.transport.brokers import Finder
from zrpc.transport.credit import CreditLink
from zrpc.transport.identities import BROKER
from zrpc.transport.link_endpoint import LinkEndpoint
from zrpc.transport.relaying import Listeners, Relaying
from zrpc.transport.socket_link import RelayLink
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
OnBreak = Callable[[frozenset["Incarnation"], str], None]


def _ignore(*_: object) -> None: ...


CREDIT_NBYTES = 64 << 20
"""What may be on the way to one peer that has not read it. It may lie in the broker, once for each sender."""
GRACE_S = 30.0
ON_READER_S = 0.1
_SEARCHING = "there is no connection to a broker, and one is looked for. Nothing was sent"


class BrokeredEndpoint(LinkEndpoint):
    """One worker's end of the brokered transport.

    Peers are known by `add_peer`; the membership calls it, and `lose_peer` or `remove_peer` when they are gone.

    Args:
        addresses: the broker's, `broker://host:port` or `tcp://host:port`, or those of several.
        incarnation: this life.
        local: have links with workers of this host.
        busy_poll_s: see `Polling`.
        credentials: what it proves itself with, and whom it lets in; None: nothing, and anybody.
        grace_s: how long a broker is looked for after a connection broke.

    Attributes:
        heard_at: when anything last came from the broker (`time.monotonic`).

    Raises:
        ConfigError: the address is not one, or its host is not known.
    """

    def __init__(
        self, addresses: str | Sequence[str], incarnation: Incarnation, *, local: bool = False,
        busy_poll_s: float = 0.0, credentials: Credentials | None = None, grace_s: float = GRACE_S,
    ) -> None:  # fmt: skip
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        self._numeric_addresses = {sockets.split_address(sockets.resolve(one)) for one in self._addresses}
        self._on_control: OnControl = _ignore
        self._on_broker_lost: OnBrokerLost = _ignore
        self._on_connected: Callable[[], None] = _ignore
        self._on_broken: Callable[[], None] = _ignore
        self._on_local_lost: OnLost = _ignore
        self._on_break: OnBreak = _ignore
        self._on_resume: Callable[[], None] = _ignore
        self.heard_at = time.monotonic()
        self._group = ""
        self._broker_lost: str | None = None
        self._for_reader: deque[Callable[[], None]] = deque()
        self._connection: BrokerConnection
        super().__init__(
            incarnation, self._make_receiver, local=local, is_thrifty=True, busy_poll_s=busy_poll_s, wake=[BROKER, b""],
            credentials=credentials,
        )  # fmt: skip
        finder = Finder(self._context, self._addresses, incarnation, credentials, self._is_over)
        listeners = Listeners(
            self._break, self._note_heard, lambda: self._on_connected(), self.lose_broker, self._do_on_reader,
            self._is_over,
        )  # fmt: skip
        self._relaying = Relaying(self._addresses, self._connection, finder, grace_s, listeners)
        if self._local_links is not None:
            self._local_links.tell(self._on_link_closed)
        self._closed_links: dict[Incarnation, str] = {}  # of workers of this host; owned by the lock
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
        return self._numeric_addresses

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

    @property
    def address(self) -> str:
        """Of the broker that it is connected to, or was."""
        return self._relaying.address

    # ---- for the membership -----------------------------------------------------------------------------------------

    def tell(
        self, on_control: OnControl, on_broker_lost: OnBrokerLost, on_broken: Callable[[], None],
        on_connected: Callable[[], None], on_local_lost: OnLost, group: str,
    ) -> None:  # fmt: skip
        """Say who is to be told. To be called once, before `open`. None may block.

        Args:
            on_control: takes the broker's own messages.
            on_broker_lost: is told that it is gone, why, and whether it refused this worker. Any thread.
            on_broken: is told when the connection broke, and a broker is looked for. On the watcher.
            on_connected: is told when there is a connection again. On the watcher.
            on_local_lost: is told of a worker of this host that is gone, while there is no broker.
            group: which of the broker's groups this is about.
        """
        self._on_control, self._on_broker_lost = on_control, on_broker_lost
        self._on_broken, self._on_connected, self._on_local_lost = on_broken, on_connected, on_local_lost
        self._group = group

    def tell_breaks(self, on_break: OnBreak, on_resume: Callable[[], None]) -> None:
        """Say who is to be told of connections that break. To be called once, before `open`.

        Args:
            on_break: is told which workers were sent to through the broker, and why the connection is gone. It returns
                when what came of that is done: only then a broker is looked for. On the watcher.
            on_resume: is told that they can be sent to again. On the reading thread: it must not block.
        """
        self._on_break, self._on_resume = on_break, on_resume

    def open(self) -> None:
        """Begin to read: the broker's messages are taken from now on, the workers' kept until `start`. Idempotent.

        Raises:
            LimitError: the system gives no thread.
        """
        self._begin()

    def tell_broker(self, frames: Sequence[Buffer]) -> None:
        """Send a message to the broker itself. Raises what `send` raises."""
        if self._is_over():
            raise self._refusal(BROKER)
        if self._relaying.is_searching:
            raise NotConnectedError(_SEARCHING)
        try:
            self._connection.link.send(frames, BROKER)
        except PeerLostError as error:
            raise NotConnectedError(_SEARCHING) from error
        self.inbox.polling.give_way()

    def is_connected(self) -> bool:
        """Whether both connections to the broker are made."""
        return self._connection.is_up

    def is_host_gone(self, for_s: float) -> bool:
        """See `BrokerConnection.is_host_gone`."""
        return self._connection.is_host_gone(for_s)

    def is_resumed(self) -> bool:
        """Whether others can be sent to through the broker."""
        return self._relaying.is_resumed

    def break_off(self, reason: str) -> None:
        """The broker does not answer: look for one. Any thread."""
        with self._lock:
            if not self._is_over():
                self.heard_at = time.monotonic()
                self._relaying.ask_to_break(reason)
                self._wake(self._watcher_wake)

    def resume(self) -> None:
        """The broker has the group together again: others can be sent to."""
        if self._relaying.resume():
            self._on_resume()

    def add_peer(self, peer: Incarnation, _address: str = "") -> None:
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
            self._closed_links.pop(peer, None)
        if link is not None:
            link.close(linger_s=0.0)
        return known

    def lose_peer(self, peer: Incarnation, reason: str) -> None:
        """The same for one that is lost: `on_lost` is told, once."""
        if self.remove_peer(peer, reason):
            self._deliver(peer, reason)

    def lose_broker(self, reason: str, is_refused: bool = False) -> None:
        """The broker is gone, or lets this worker in no more (`is_refused`), and every peer with it. Idempotent."""
        with self._lock:
            if self._closed or self._broker_lost is not None:
                return
            self._broker_lost = reason
            self._relaying.give_up()
            peers = list(self._peers)
            self._wake(self._reader_wake)
        for peer in peers:
            self.lose_peer(peer, reason)
        self._on_broker_lost(reason, is_refused)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _make_receiver(self, context: sockets.Context) -> sockets.Socket:
        self._connection = BrokerConnection(context, self.incarnation, self._credentials, self._on_queued)
        if len(self._addresses) == 1:  # else the watcher looks for one
            self._connection.connect(self._addresses[0])
        return self._connection.receiver

    def _open(self, peer: Incarnation) -> Link:
        with self._lock:
            if self._closed or self._broker_lost is not None or peer not in self._peers:
                raise self._refusal(peer)
            link = self._links.get(peer)
            if link is None and self._local_links is not None:
                link = self._local_links.connect(peer)
            if link is None:
                if not self.is_resumed():
                    raise NotConnectedError(_SEARCHING)
                link = CreditLink(RelayLink(peer, self._connection.link), CREDIT_NBYTES)
            self._links[peer] = link
            return link

    def _close_links(self, links: Sequence[Link], deadline: float) -> None:
        to_broker = self._connection.link
        if can_flush := self.is_connected() and self._broker_lost is None:
            to_broker.flush(deadline - time.monotonic())
        to_broker.close(deadline - time.monotonic() if can_flush else 0.0)
        super()._close_links(links, deadline)

    def _close_monitors(self) -> None:
        self._connection.close_monitors()

    def _why_gone(self, peer: bytes) -> str:
        return self._broker_lost or super()._why_gone(peer)

    def _is_over(self) -> bool:
        return self._closed or self._broker_lost is not None

    def _take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        if self._is_over() or (source == BROKER and len(frames) == 1 and not frames[0]):  # that only wakes the reader
            while self._for_reader:
                self._for_reader.popleft()()
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
        self._connection.await_sent(deadline)

    # ---- the watcher ------------------------------------------------------------------------------------------------

    def _watch_once(self) -> None:
        self._relaying.watch_once(self._watcher_end, self._drain_interval_ms, self._group)

    def _break(self, reason: str) -> None:
        """The connection is gone: nothing leaves through it any more, and what was on its way may be lost."""
        with self._lock:
            relayed = {peer: link for peer, link in self._links.items() if isinstance(link, CreditLink)}
            for peer in relayed:
                del self._links[peer]
                self._owed.pop(peer, None)
            gone = dict(self._closed_links)
        for link in relayed.values():
            link.break_off()
        for peer, why in gone.items():
            self._do_on_reader(partial(self._lose_local, peer, why))
        self._on_break(frozenset(relayed), reason)
        self._on_broken()

    def _note_heard(self) -> None:
        self.heard_at = time.monotonic()

    def _do_on_reader(self, task: Callable[[], None]) -> bool:
        """Have the reading thread do `task`, and wait for it; false: reading is over."""
        done = threading.Event()

        def run() -> None:
            try:
                task()
            except Exception as error:  # it has more to read
                finalizers.defer(partial(log_error, log, "what the watcher asked for was not done", error=error))
            finally:
                done.set()

        self._for_reader.append(run)
        while not self._is_over():
            self.interrupt()
            if done.wait(ON_READER_S):
                return True
        return False

    # ---- workers of this host ---------------------------------------------------------------------------------------

    def _on_link_closed(self, peer: Incarnation, reason: str) -> None:
        """On the reading thread. While there is a broker, it says what became of that worker."""
        with self._lock:
            if peer not in self._peers:
                return
            self._closed_links[peer] = reason
        if not self.is_resumed():
            self._lose_local(peer, reason)

    def _lose_local(self, peer: Incarnation, reason: str) -> None:
        self.lose_peer(peer, reason)
        self._on_local_lost(peer, reason)
