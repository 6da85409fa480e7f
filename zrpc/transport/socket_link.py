"""Links over a ZeroMQ socket: the socket behind a lock, and a bounded queue for what it does not take yet."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import zmq

from zrpc.errors import NotConnectedError, OverloadedError, PeerLostError
from zrpc.transport.link import MAX_QUEUED, MAX_QUEUED_NBYTES, SEND_COPY_MAX_NBYTES
from zrpc.wire.envelope import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.sockets import Socket
    from zrpc.wire.envelope import Buffer

_GONE = "the connection is closed"


class SocketLink:
    """A link on a DEALER of its own. The socket and the queue are owned by the lock.

    Args:
        sock: what messages are sent on. The link closes it.
        on_queued: called, under the lock, where a message did not leave at once: `drain` is to be called until it says
            True.
    """

    takes_files = False

    def __init__(self, sock: Socket, on_queued: Callable[[SocketLink], None]) -> None:
        self._sock = sock
        self._on_queued = on_queued
        self._lock = threading.Lock()
        self._queue: deque[list[Buffer]] = deque()
        self._nbytes = 0  # of the queue
        self._closed = False

    @property
    def queued_nbytes(self) -> int:
        """See `Link.queued_nbytes`."""
        return self._nbytes

    def send(self, frames: Sequence[Buffer], to: bytes | None = None) -> None:
        """See `Link.send`. `to`: whom it is for, where that does not go without saying."""
        if self._closed:  # while it is flushed the lock is taken for long
            raise PeerLostError(_GONE)
        with self._lock:
            if self._closed:
                raise PeerLostError(_GONE)
            message = [*frames] if to is None else [to, *frames]
            if not self._queue:
                try:
                    send_frames(self._sock, message)
                    return
                except zmq.Again:
                    pass
                except zmq.ZMQError as error:
                    raise PeerLostError(f"{_GONE} ({error})") from error
            if self._queue and (len(self._queue) >= MAX_QUEUED or self._nbytes >= MAX_QUEUED_NBYTES):
                raise OverloadedError(
                    f"{len(self._queue)} messages of {self._nbytes} bytes wait for a peer that does not read them: "
                    "send fewer at once"
                )
            self._queue.append(message)
            self._nbytes += nbytes_of(message)
            self._on_queued(self)

    def drain(self) -> bool:
        """Send what is queued, as far as the socket takes it. True: nothing is left."""
        with self._lock:
            while self._queue and not self._closed:
                try:
                    send_frames(self._sock, self._queue[0])
                except zmq.Again:
                    return False
                self._nbytes -= nbytes_of(self._queue.popleft())
            return True

    def flush(self, timeout_s: float) -> None:
        """See `Link.flush`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            while self._queue:
                try:
                    send_frames(self._sock, self._queue[0])
                    self._queue.popleft()
                except zmq.Again:
                    left_ms = int((deadline - time.monotonic()) * 1000)
                    if left_ms <= 0 or not self._sock.poll(left_ms, zmq.POLLOUT):
                        return

    def close(self, linger_s: float) -> None:
        """See `Link.close`."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._sock.close(linger=max(0, int(linger_s * 1000)))


class RelayLink:
    """A link through the broker, which all workers that it relays to share.

    Args:
        peer: to whom.
        to_broker: the link to the broker. It is not closed with this.
    """

    takes_files = False

    def __init__(self, peer: Incarnation, to_broker: SocketLink) -> None:
        self._peer = peer
        self._to_broker = to_broker

    @property
    def queued_nbytes(self) -> int:
        """See `Link.queued_nbytes`: what the system has not taken yet may be for any worker, and counts for none."""
        return 0

    def send(self, frames: Sequence[Buffer]) -> None:
        """See `Link.send`.

        Raises:
            NotConnectedError: the connection to the broker is closed. The peer may well live.
            OverloadedError: too much waits for it.
        """
        try:
            self._to_broker.send(frames, self._peer)
        except PeerLostError as error:
            raise NotConnectedError(f"the connection to the broker broke ({error}). The message was not sent") from None

    def flush(self, timeout_s: float) -> None:
        """See `Link.flush`: the link to the broker is flushed for all."""

    def close(self, linger_s: float) -> None:
        """See `Link.close`."""


def send_frames(sock: Socket, frames: list[Buffer]) -> None:
    """Send one message without blocking. Until it has left, the memory of large frames must stay as it is.

    Where Ctrl-C interrupts it, an empty frame follows: the rest of a message that is damaged by it, or a message that
    nobody heeds.

    Raises:
        zmq.Again: the high-water mark is reached; nothing was sent.
        zmq.ZMQError: the socket is closed, or (ROUTER) the peer is not connected; nothing was sent.
    """
    last = len(frames) - 1
    try:
        for index, frame in enumerate(frames):
            flags = zmq.NOBLOCK if index == last else _AND_MORE
            _send(sock, frame, flags, len(frame) <= SEND_COPY_MAX_NBYTES, False)
    except zmq.ZMQError:
        raise
    except BaseException:  # Ctrl-C: what has left, if anything, must not be taken for the beginning of the next message
        if last:
            with suppress(zmq.ZMQError):
                _send(sock, b"", zmq.NOBLOCK, True, False)
        raise


_AND_MORE = zmq.NOBLOCK | zmq.SNDMORE
_send: Any = zmq.backend.Socket.send
"""Without what `Socket.send` does for groups and routing ids, which takes a fifth of the time."""
