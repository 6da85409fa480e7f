"""Small messages between workers of one host, past ZeroMQ's threads.

A message that ZeroMQ carries changes threads three times, and threads and kernel take turns in the caches of few
processors. Between two threads that poll, a Unix socket of their own takes a fifth of the time: a bare round trip of
13 µs instead of 60-85 on two processors. So a worker listens on one, and workers of its host send it their small
messages of one frame there. All else, and whatever the shortcut does not take at once, goes *around*, through ZeroMQ's
sockets.

Messages keep their order:

- What was sent here is read before what its sender sent around after it (`zrpc.transport.inbox`).
- What follows a message that went around goes around too, until the receiver has sent back the mark that was the first
  frame of that message. Where several threads send without a pause that may be never, and nothing is lost by it.

A connection is used once the receiver has welcomed it, and neither side lets in another user's process. So nothing is
sent here that nobody will read, unless the receiver dies. That is ZeroMQ's to tell: a shortcut that breaks is none any
more, and that is all.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from zrpc.transport import descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

MAX_NBYTES = 16_384
"""Larger messages go around."""
SEND_BUFFER_NBYTES = 1 << 20
"""What the kernel holds for a receiver that is late to read, if it is allowed to; a message of 100 bytes takes 768."""
_HELLO = b"zrpc"
_MARK = b"\xc1\x04"
_NUMBER = struct.Struct("<Q")
_MARK_NBYTES = len(_MARK) + _NUMBER.size
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_BACKLOG = 1024
_ACCEPTED_MAX = 64
"""So many connections are taken in between two messages: anybody may try to connect, and keep the reader busy."""
_LAST_MAX = 16_384
"""So many messages are received of one who is gone: more than the kernel holds, if it does not live and send more."""


_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""A receiver that is gone is an error, and no SIGPIPE, which a program may have made deadly again."""
_ONCE = select.EPOLLIN | select.EPOLLET if sys.platform.startswith("linux") else 0


class Shortcuts:
    """The receiving end of one worker. Belongs to whoever reads its inbox.

    Args:
        me: whose it is.
        is_thrifty: take connections in only while this process may open many more files.

    Raises:
        OSError: there cannot be one.
    """

    def __init__(self, me: Incarnation, *, is_thrifty: bool = False) -> None:
        self._is_thrifty = is_thrifty
        self._listener = make_socket()
        try:
            self._listener.bind(address_of(me))
            self._listener.listen(_BACKLOG)
            self._epoll = select.epoll()
        except OSError:
            self._listener.close()
            raise
        # Edge-triggered: one that cannot be accepted, for want of files, is not looked at before the next comes.
        self._epoll.register(self._listener, _ONCE)
        self._listens_on = self._listener.fileno()
        self._connections: dict[int, tuple[socket.socket, Incarnation]] = {}  # by file; b"" until it says who sends
        self._by_source: dict[Incarnation, socket.socket] = {}
        self._ready: list[int] = []  # files

    @classmethod
    def make(cls, me: Incarnation, *, is_thrifty: bool = False) -> Shortcuts | None:
        """The receiving end of that worker; None where there cannot be one."""
        try:
            return cls(me, is_thrifty=is_thrifty) if sys.platform.startswith("linux") else None
        except OSError:
            return None

    def fileno(self) -> int:
        """A file that can be read while there is something to receive."""
        return self._epoll.fileno()

    @property
    def has_seen(self) -> bool:
        """Whether the last look showed something that was not received yet."""
        return bool(self._ready)

    def is_ready(self) -> bool:
        """Whether there is something to receive, maybe only a connection that begins or ends."""
        if not self._ready:
            events = self._epoll.poll(0)
            if not events:  # as a rule, where a thread polls
                return False
            self._ready = [file for file, _ in events]
        return True

    def receive(self) -> tuple[Incarnation, bytes] | None:
        """The next message, and who sent it; None if there is none, or none yet. Senders take turns."""
        while self.is_ready():
            file = self._ready.pop()
            connection = self._connections.get(file)
            if connection is not None:
                message = self._receive(*connection)
                if message:
                    return connection[1], message
            elif file != self._listens_on:  # Ctrl-C struck where it was taken in or let go
                self._unregister(file)
            elif not self._accept():
                break
        return None

    def receive_from(self, source: Incarnation) -> bytes | None:
        """The next message of `source`; None if there is none."""
        sock = self._by_source.get(source)
        return None if sock is None else self._receive(sock, source)

    def forget(self, source: Incarnation) -> list[bytes]:
        """`source` is gone: what it has sent. Nothing more of it is received, should it live after all."""
        messages: list[bytes] = []
        sock = self._by_source.get(source)
        if sock is not None:
            while len(messages) < _LAST_MAX and (message := self._receive(sock, source)) is not None:
                messages.append(message)
            if self._by_source.get(source) is sock:
                self._drop(sock, source)
        return messages

    def send_back(self, mark: Buffer, source: Incarnation) -> None:
        """A mark of `source` came: what it is the last frame of has been read, and all that was sent before."""
        sock = self._by_source.get(source)
        if sock is not None:
            with suppress(OSError):  # it is gone, or does not look; then it goes on to go around
                sock.send(mark, _NO_SIGNAL)

    def close(self) -> None:
        """Receive nothing any more. Idempotent."""
        self._epoll.close()
        self._listener.close()
        for sock, _ in self._connections.values():
            sock.close()
        self._connections.clear()

    def _accept(self) -> bool:
        """Take in connections; false if there may be more."""
        for _ in range(_ACCEPTED_MAX):
            try:
                sock, _ = self._listener.accept()
            except OSError:  # there is none any more, or no file for it
                return True
            try:
                if not _is_of_this_user(sock):
                    raise PermissionError("another user's process connects")
                if self._is_thrifty and not descriptors.are_plenty():
                    raise OSError("files are for what cannot be done without")
                sock.setblocking(False)
                self._connections[sock.fileno()] = sock, b""
                self._epoll.register(sock, select.EPOLLIN)
            except OSError:
                self._drop(sock, b"")
        self._epoll.modify(self._listens_on, _ONCE)  # look again
        return False

    def _drop(self, sock: socket.socket, source: Incarnation) -> None:
        file = sock.fileno()
        self._unregister(file)  # closing is not enough: a child that was forked has the connection too
        self._connections.pop(file, None)
        if self._by_source.get(source) is sock:
            del self._by_source[source]
        sock.close()

    def _unregister(self, file: int) -> None:
        with suppress(OSError):  # it never was, or is no more
            self._epoll.unregister(file)

    def _receive(self, sock: socket.socket, source: Incarnation) -> bytes | None:
        try:
            message = sock.recv(MAX_NBYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # it was closed with marks unread, which says nothing of what it has sent
            return self._receive(sock, source)
        except OSError:
            message = b""
        if message and source:
            return message
        if message.startswith(_HELLO):
            source = message.removeprefix(_HELLO)
            self._connections[sock.fileno()] = sock, source
            self._by_source[source] = sock
            self.send_back(mark_of(0), source)
        else:
            self._drop(sock, source)
        return None


class Shortcut:
    """The sending end toward one peer. Owned by the lock of its outbox.

    What was sent to the peer before it was made has gone around.

    Args:
        me: who sends.
        peer: to whom.

    Attributes:
        num_around: how many messages have gone around; the first stands for all that were sent before.

    Raises:
        OSError: there is none.
    """

    def __init__(self, me: Incarnation, peer: Incarnation) -> None:
        self._sock = make_socket()
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
            self._sock.connect(address_of(peer))
            if not _is_of_this_user(self._sock):
                raise PermissionError("another user's process listens there")
            self._sock.send(_HELLO + me, _NO_SIGNAL)
        except OSError:
            self._sock.close()
            raise
        self._is_open = True
        self.num_around = 1
        self._confirmed = -1  # how many of them have been read, for sure; -1: it is not welcome yet

    @classmethod
    def make(cls, me: Incarnation, peer: Incarnation) -> Shortcut | None:
        """The sending end toward `peer`; None where there is none."""
        try:
            return cls(me, peer) if sys.platform.startswith("linux") else None
        except OSError:
            return None

    @classmethod
    def make_thriftily(cls, me: Incarnation, peer: Incarnation) -> Shortcut | None:
        """The same, but only while this process may open many more files."""
        return cls.make(me, peer) if descriptors.are_plenty() else None

    def send(self, frames: Sequence[Buffer]) -> bool:
        """Send one message; false: it must go around."""
        if len(frames) != 1 or not 0 < len(frames[0]) <= MAX_NBYTES or not self._is_open:
            return False
        if self.num_around != self._confirmed:
            self._look()
            if self.num_around != self._confirmed:
                return False
        try:
            self._sock.send(frames[0], _NO_SIGNAL)
            return True
        except BlockingIOError:  # the peer is late to read
            return False
        except OSError:
            self.close()
            return False

    def go_around(self) -> bytes:
        """A message goes around. Returns its mark."""
        self.num_around += 1
        if self._is_open:
            self._look()  # or what comes back would be too much to hold
        return mark_of(self.num_around)

    def is_unread(self) -> bool:
        """Whether something that went around may not have been read yet, by a peer that is there."""
        if self._is_open:
            self._look()
        return self._is_open and 0 <= self._confirmed < self.num_around

    def wait_read(self, timeout_s: float) -> None:
        """Wait until all that went around has been read, up to `timeout_s`; not for a peer that is gone.

        ZeroMQ drops what a Unix socket still holds, if its sender closes it while the receiver takes in no more.
        """
        if not self._is_open:
            return
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while self.is_unread() and (left_s := deadline - time.monotonic()) > 0:
            poll.poll(left_s * 1000)

    def close(self) -> None:
        """What was sent is received all the same. Idempotent."""
        self._is_open = False
        self._sock.close()

    def _look(self) -> None:
        """See which marks have come back."""
        try:
            while mark := self._sock.recv(_MARK_NBYTES):
                (number,) = _NUMBER.unpack(mark[len(_MARK) :])
                self._confirmed = max(self._confirmed, min(number, self.num_around))
            self.close()
        except BlockingIOError:
            pass
        except (OSError, struct.error):
            self.close()


def is_mark(frame: Buffer) -> bool:
    """Whether the first frame of a message is a mark, to be sent back."""
    return len(frame) == _MARK_NBYTES and frame[: len(_MARK)] == _MARK


def mark_of(number: int) -> bytes:
    """The mark of the message that went around as the `number`-th."""
    return _MARK + _NUMBER.pack(number)


def address_of(incarnation: Incarnation) -> str:
    """Where the worker of that life listens for shortcuts: an abstract Unix socket, which leaves no file."""
    return f"\0zrpc-shortcut-{incarnation.hex()}"


def make_socket() -> socket.socket:
    """A socket for one end of a shortcut."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _is_of_this_user(sock: socket.socket) -> bool:
    """Whether the process at the other end is, for sure. Each side sees the same of the other.

    Raises:
        OSError: it cannot be looked at.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if len(credentials) != _CREDENTIALS.size:
        raise PermissionError("it is not said whose process it is")
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return bool(uid == os.geteuid() != _nobody())


@cache
def _nobody() -> int:
    """The user that all those look like who are not known in this container.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            return int(file.read())
    except FileNotFoundError:  # this is Linux's own number where nobody has set another
        return 65_534
