"""Reading one inbound socket, by one thread at a time.

The socket belongs to whoever holds the read lock: the endpoint's reading thread as a rule. Messages are handed on
outside the lock, so one that is slow to be handed on does not keep the next from being read.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import zmq

from zrpc.wire.envelope import INLINE_MAX_NBYTES, Buffer

if TYPE_CHECKING:
    from zrpc.transport.sockets import Socket


class Inbox:
    """The receiving side of a socket whose messages begin with a source frame."""

    def __init__(self, sock: Socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def read(self) -> tuple[bytes, list[Buffer]]:
        """Wait for one message; its source frame and the frames behind it. Small frames are bytes, large ones views.

        Raises:
            zmq.ZMQError: the socket is closed.
        """
        with self._lock:
            source = self._sock.recv()
            part = self._sock.recv(copy=False)
            if not part.more:
                return source, [part.bytes]
            frames: list[Buffer] = [part.bytes]
            while part.more:
                part = self._sock.recv(copy=False)
                frames.append(part.bytes if len(part) <= INLINE_MAX_NBYTES else part.buffer)
            return source, frames

    def close(self) -> None:
        """Close the socket once nobody reads it."""
        with self._lock:
            self._sock.close()


def send_frames(sock: Socket, frames: list[Buffer]) -> None:
    """Send one message without blocking: small frames as copies, large ones without (their memory must stay as it is).

    Raises:
        zmq.Again: the high-water mark is reached; nothing was sent.
        zmq.ZMQError: the socket is closed, or (ROUTER) the peer is not connected; nothing was sent.
    """
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        flags = zmq.NOBLOCK if index == last else zmq.NOBLOCK | zmq.SNDMORE
        sock.send(frame, flags, copy=len(frame) <= INLINE_MAX_NBYTES)
