"""What the two endpoints have in common: an inbox, a link to each worker, and the threads that read and watch.

What: a worker receives on one ZeroMQ socket and on its local links (`zrpc.transport.local_links`), which the inbox
reads, and sends on a link to each worker (`zrpc.transport.link`), which is made with the first message. A thread of its
own, the watcher, reads the monitors of ZeroMQ's sockets, and drains the queues of links that could not send at once.

Threads: any may call. `_lock` owns the tables and the wake sockets, and nothing waits under it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import zmq

from zrpc import threads
from zrpc.errors import AgentClosedError, PeerLostError, ZrpcError
from zrpc.ids import EndedLives
from zrpc.transport import fork, sockets
from zrpc.transport.credentials import keyring_of
from zrpc.transport.credit import CreditLink, answer_of, is_mark, total_of
from zrpc.transport.inbox import READERS, Inbox
from zrpc.transport.local_links import LocalLinks
from zrpc.wire.observing import OBSERVER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials
    from zrpc.transport.inbox import Work
    from zrpc.transport.link import Link
    from zrpc.transport.multipart import Check
    from zrpc.transport.socket_link import SocketLink
    from zrpc.wire.envelope import Buffer

DRAIN_INTERVAL_MS = 2
JOIN_MIN_S = 0.1
"""So long, at least, a closing endpoint waits for its threads: one that does not work ends at once."""
_WAKE_READER = "inproc://wake-reader"
_WAKE_WATCHER = "inproc://wake-watcher"


class LinkEndpoint(ABC):
    """One worker's end of the transport.

    Args:
        incarnation: this life of the worker.
        make_inbound: makes the socket that it receives on, in a context. What it raises is raised here.
        local: have links with workers of this host.
        is_thrifty: those, only while this process may open many more files.
        busy_poll_s: see `Polling`.
        wake: a message to itself that says nothing.
        credentials: what it proves itself with, and whom it lets in; None: nothing, and anybody.
        check: see `Messages`; None where all members may say that they are any of them.
    """

    def __init__(
        self, incarnation: Incarnation, make_inbound: Callable[[sockets.Context], sockets.Socket], *, local: bool,
        is_thrifty: bool, busy_poll_s: float, wake: Sequence[bytes], credentials: Credentials | None,
        check: Check | None = None,
    ) -> None:  # fmt: skip
        self.incarnation = incarnation
        self._credentials = credentials
        self.is_encrypted = credentials is not None
        self._wake_frames = wake
        self._context = sockets.make_context()
        try:
            inbound = make_inbound(self._context)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        inbound.bind(_WAKE_READER)
        self._local_links = LocalLinks.make(incarnation, credentials, is_thrifty=is_thrifty) if local else None
        self.inbox = Inbox(
            inbound, self._take if check is None else self._take_unless_revoked, self._is_over, self.interrupt,
            self._local_links, busy_poll_s, check,
        )  # fmt: skip
        self._watcher_end = self._context.socket(zmq.PAIR)
        self._watcher_end.bind(_WAKE_WATCHER)
        self._reader_wake = self._wake_socket(_WAKE_READER, zmq.DEALER)
        self._watcher_wake = self._wake_socket(_WAKE_WATCHER, zmq.PAIR)
        self._lock = threading.Lock()  # owns what follows and the wake sockets
        self._links: dict[Incarnation, Link] = {}
        self._owed: dict[Incarnation, bytes] = {}  # to workers that cannot be sent to yet; of the thread that reads
        self._gone = EndedLives()
        self._revoked: set[Incarnation] = set()  # their keys were
        self._clogged: set[SocketLink] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []
        fork.drop_in_children(self)

    # ---- for the endpoints ------------------------------------------------------------------------------------------

    @abstractmethod
    def local_ports(self) -> set[int]:
        """See `fork.Connected`."""

    @abstractmethod
    def remote_addresses(self) -> set[tuple[str, int]]:
        """See `fork.Connected`."""

    @abstractmethod
    def _open(self, peer: Incarnation) -> Link:
        """The link to `peer`, which is made here if there is none yet.

        Raises:
            PeerLostError: it is not known, or gone.
            AgentClosedError: this endpoint is closed.
        """

    @abstractmethod
    def _take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        """A message came; see `zrpc.transport.inbox.Take`."""

    @abstractmethod
    def _watch_once(self) -> None:
        """Wait for what monitors say, or to be woken, and see to it."""

    @abstractmethod
    def _wait_sent(self, deadline: float) -> None:
        """Wait until ZeroMQ has sent all that it took, up to `deadline`: the process is about to end."""

    @abstractmethod
    def _close_monitors(self) -> None:
        """Close the sockets of monitors."""

    def _is_over(self) -> bool:
        return self._closed

    def _why_gone(self, peer: bytes) -> str:
        return self._gone.get(peer, "it is not connected")

    # ---- Endpoint ---------------------------------------------------------------------------------------------------

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        """Send one message to a worker; see `Endpoint.send`."""
        link = self._links.get(to) or self._open(to)
        try:
            link.send(frames)
        except PeerLostError as error:
            raise self._refusal(to) from error
        self.inbox.polling.give_way()

    def takes_files(self, to: Incarnation) -> bool:
        """See `Endpoint.takes_files`."""
        return self._local_links is not None and (self._links.get(to) or self._open(to)).takes_files

    def meet(self, peer: Incarnation) -> None:
        """See `Endpoint.meet`."""
        owed = self._owed.pop(peer, None)
        if owed is not None:
            self._answer_mark(peer, owed)

    def why_not_observe(self, life: Incarnation) -> str | None:
        """See `Endpoint.why_not_observe`."""
        keyring = keyring_of(self._credentials)
        if keyring is None:
            return None
        keyring.reload()
        return keyring.why_not_name(life, OBSERVER_NAME)

    def queued_nbytes(self, to: Incarnation) -> int:
        """See `Endpoint.queued_nbytes`."""
        link = self._links.get(to)
        return 0 if link is None else link.queued_nbytes

    def release(self) -> None:
        """See `Endpoint.release`."""
        for link in list(self._links.values()):
            if isinstance(link, CreditLink):
                link.release()

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
        if not at_exit:
            self.inbox.end()
        elif self._local_links is not None:
            self._local_links.hide()
        with self._lock:
            links, self._links = list(self._links.values()), {}
        self._close_links(links, deadline)
        if at_exit:  # others watch their own connections, to what this one receives on
            self._wait_sent(deadline)
            sockets.keep_to_the_end(self)
            return
        self.inbox.close()
        for sock in (self._watcher_end, self._reader_wake, self._watcher_wake):
            sock.close()
        self._close_monitors()
        self._context.term()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _take_unless_revoked(self, source: bytes, frames: list[Buffer]) -> Work | None:
        """Take what comes of others: what a local link still brings of one whose key was revoked is dropped."""
        return None if source in self._revoked else self._take(source, frames)

    def _is_mark(self, source: Incarnation, frames: list[Buffer]) -> bool:
        """Whether a message is a mark (`zrpc.transport.credit`); then it is seen to."""
        if not is_mark(frames):
            return False
        answer = answer_of(frames)
        if answer is not None:
            self._answer_mark(source, answer)
        elif isinstance(link := self._links.get(source), CreditLink):
            link.confirm(total_of(frames))
        return True

    def _answer_mark(self, peer: Incarnation, answer: bytes) -> None:
        """Send a mark back; if its sender is not known here yet, when it is."""
        try:
            self.send(peer, (answer,))
        except ZrpcError:
            if peer not in self._gone:
                self._owed[peer] = answer

    def _close_links(self, links: Sequence[Link], deadline: float) -> None:
        for link in links:
            link.flush(deadline - time.monotonic())
        for link in links:
            link.close(deadline - time.monotonic())

    def _begin(self) -> None:
        """Start the threads, once.

        Raises:
            LimitError: the system gives no thread.
        """
        with self._lock:
            if self._threads or self._closed:
                return
            readers = [(self.inbox.run, f"zrpc-reader-{number}") for number in range(READERS)]
        for target, name in (*readers, (self._watch_loop, "zrpc-watcher")):
            self._threads.append(threads.start(target, name))

    def _watch_loop(self) -> None:
        threads.keep_running(self._watch_and_drain, self._is_over)

    def _watch_and_drain(self) -> None:
        self._watch_once()
        with self._lock:
            clogged, self._clogged = self._clogged, set()  # one that finds its queue full anew puts itself back
        still = [link for link in clogged if not link.drain()]
        with self._lock:
            self._clogged.update(still)

    @property
    def _drain_interval_ms(self) -> int | None:
        """How long the watcher may wait for monitors; None: for ever."""
        return DRAIN_INTERVAL_MS if self._clogged else None

    def _on_queued(self, link: SocketLink) -> None:
        """`link` could not send at once. Any thread."""
        with self._lock:
            if link not in self._clogged:
                self._clogged.add(link)
                if not self._closed:
                    self._wake(self._watcher_wake)

    def _refusal(self, to: bytes) -> Exception:
        if self._closed:
            return AgentClosedError("this worker has shut down its transport")
        return PeerLostError(f"the peer is gone: {self._why_gone(to)}")

    def _wake_socket(self, address: str, kind: int) -> Any:
        sock: sockets.Socket = self._context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(address)
        return sock

    def _wake(self, sock: sockets.Socket) -> None:
        """Make the thread at the other end look around, if there is one. Call it under the lock."""
        with contextlib.suppress(zmq.Again):  # it has been woken often enough
            sock.send_multipart(self._wake_frames, zmq.NOBLOCK)
