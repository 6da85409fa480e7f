"""The sending end of a local link: a Unix socket behind a lock, and a bounded queue for what it does not take yet.

What: messages become packets (`zrpc.transport.packets`), which are sent at once as long as the kernel takes them. The
others wait in the queue, and the thread that reads sends them when there is room (`zrpc.transport.local_links`).

Threads: any may send. The lock is held while packets are sent, which never waits.

Failure: a socket whose other end is closed makes the link raise `PeerLostError`, and what waits is dropped.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from zrpc.errors import OverloadedError, PeerLostError
from zrpc.transport.link import MAX_QUEUED, MAX_QUEUED_NBYTES, SEND_COPY_MAX_NBYTES
from zrpc.transport.packets import Packet, cut, is_whole
from zrpc.wire.envelope import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

_RETRY_S = 0.001
"""The kernel takes no more files for now, and does not say when it will."""
_NO_ROOM = (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class LinkWatch(Protocol):
    """What a link needs of the thread that reads."""

    def await_room(self, link: LocalLink) -> None:
        """`link` has more to send: call its `drain` when there is room."""

    def await_closed(self, link: LocalLink) -> None:
        """`link` has nothing to send."""

    def forget_link(self, link: LocalLink) -> None:
        """`link` is about to be closed."""


class LocalLink:
    """The sending end toward one peer. Any thread may use it.

    Args:
        peer: to whom.
        sock: connected.
        watch: tells when there is room again.
    """

    takes_files = True

    def __init__(self, peer: Incarnation, sock: socket.socket, watch: LinkWatch) -> None:
        self.peer = peer
        self._sock = sock
        self._watch = watch
        self._lock = threading.Lock()  # owns what follows
        self._queue: deque[Packet] = deque()
        self._nbytes = 0  # of the queue
        self._takes_more = True
        self._closed = False

    @property
    def file(self) -> int:
        """The descriptor of its socket; -1: it is closed."""
        return self._sock.fileno()

    @property
    def queued_nbytes(self) -> int:
        """See `Link.queued_nbytes`."""
        return self._nbytes

    def send(self, frames: Sequence[Buffer]) -> None:
        """See `Link.send`."""
        with self._lock:
            if not self._takes_more:
                raise PeerLostError("the connection is closed")
            if not self._queue and is_whole(frames):
                try:
                    self._sock.send(frames[0], _NO_SIGNAL)
                    return
                except OSError as error:
                    self._check(error)
            if self._queue and (len(self._queue) >= MAX_QUEUED or self._nbytes >= MAX_QUEUED_NBYTES):
                raise OverloadedError(
                    f"{len(self._queue)} packets of {self._nbytes} bytes wait for a peer that does not read them: "
                    "send fewer at once"
                )
            was_clear = not self._queue
            packets = cut(frames)
            self._queue.extend(packets)
            self._nbytes += sum(packet.nbytes for packet in packets)
            if was_clear and self._drain():
                return
            if nbytes_of(frames) <= SEND_COPY_MAX_NBYTES:  # the caller may write to it again
                left = [self._queue.pop() for _ in range(min(len(packets), len(self._queue)))]
                self._queue.extend(packet.copied() for packet in reversed(left))
            if was_clear:
                self._watch.await_room(self)

    def drain(self) -> bool:
        """Send what waits, as far as the kernel takes it. True: nothing is left."""
        with self._lock:
            try:
                if not self._closed and not self._drain():
                    return False
            except PeerLostError:
                self._queue.clear()
            self._watch.await_closed(self)
            return True

    def is_gone(self) -> bool:
        """Whether the other end was closed."""
        with self._lock:
            if self._closed:
                return False
            try:
                return not self._sock.recv(1)  # nothing is ever sent this way
            except BlockingIOError:
                return False
            except OSError:
                return True

    def flush(self, timeout_s: float) -> None:
        """See `Link.flush`."""
        self._takes_more = False
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        with suppress(ValueError):  # it is closed
            poll.register(self._sock, select.POLLOUT)
        while not self.drain() and (left_s := deadline - time.monotonic()) > 0:
            poll.poll(left_s * 1000)

    def close(self, linger_s: float = 0.0) -> None:
        """See `Link.close`: what was sent is received all the same."""
        with self._lock:
            if not self._closed:
                self._takes_more, self._closed = False, True
                self._queue.clear()
                self._watch.forget_link(self)
                self._sock.close()

    def _drain(self) -> bool:
        """See `drain`. Call it under the lock."""
        while self._queue:
            try:
                self._queue[0].send(self._sock)
            except OSError as error:
                self._check(error)
                return False
            self._nbytes -= self._queue.popleft().nbytes
        return True

    def _check(self, error: OSError) -> None:
        """See that `error` says only that there is no room now.

        Raises:
            PeerLostError: it says that the other end is closed.
        """
        if error.errno not in _NO_ROOM:
            raise PeerLostError(f"the connection broke ({error})") from error
        if error.errno == errno.ETOOMANYREFS:
            time.sleep(_RETRY_S)
