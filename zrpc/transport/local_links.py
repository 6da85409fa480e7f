"""Links between the workers of one host: one Unix socket a direction, small messages whole, files of shared memory.

What: a worker listens on a Unix socket (`zrpc.transport.local_socket`). Each other worker of the host connects once,
says its incarnation, and sends all its messages to it there (`zrpc.transport.packets`). Between two threads that poll,
such a socket takes a fifth of the time of ZeroMQ's, whose messages change threads three times: a bare round trip of
13 us instead of 60 to 85 on two processors.

Invariants: messages of one worker come in order. What was sent is received, also if its sender has closed the
connection, unless the receiver is gone. A worker that has closed its end of a link may still send on its own: it is
reported as gone once that is closed too, and read to its end.

Threads: `LocalLinks` belongs to the thread that reads, but for `connect`, which any thread may call. A `LocalLink` has
a lock; any thread may send. What the kernel does not take at once waits in the link, and is sent by the thread that
reads, when there is room again.

Failure: a link whose other end was closed is broken, and `on_broken` is told. Where this process may open no file for a
connection that waits, it is tried again when the next one comes.
"""

from __future__ import annotations

import errno
import hmac
import logging
import reprlib
import select
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from zrpc import finalizers, protocol_errors
from zrpc.errors import ProtocolError, ZrpcError
from zrpc.exception_text import log_error
from zrpc.ids import INCARNATION_NBYTES
from zrpc.transport import descriptors, local_socket
from zrpc.transport.local_link import LocalLink
from zrpc.transport.packets import Incoming

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials
    from zrpc.wire.envelope import Buffer

    OnBroken = Callable[[Incarnation, str], None]

log = logging.getLogger("zrpc")

FILES_PER_PEER = 2
_HELLO = b"zrpc-local-1:"
_ACCEPTED_MAX = 64
"""So many connections are taken in between two messages."""
_LAST_MAX = 16_384
"""So many messages are received of a worker that is gone: more than the kernel holds, if it does not live on."""
_IS_LINUX = sys.platform.startswith("linux")
_ONCE = select.EPOLLIN | select.EPOLLET if _IS_LINUX else 0
_CLOSED = select.EPOLLIN | select.EPOLLRDHUP if _IS_LINUX else 0
_BROKEN = "its process has closed the connection, or is gone"
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class LocalLinks:
    """The links of one worker: those that it receives on, and those that it sends on.

    Args:
        me: whose they are.
        credentials: what it proves itself with, and whom it lets in; None: the user of its process is enough.
        is_thrifty: have links only while this process may open many more files.

    Raises:
        OSError: there cannot be any.
    """

    def __init__(self, me: Incarnation, credentials: Credentials | None = None, *, is_thrifty: bool = False) -> None:
        if not _IS_LINUX:
            raise OSError(errno.ENOTSUP, "this system has no such sockets")
        self._me = me
        self._is_thrifty = is_thrifty
        self._credentials = credentials
        self._on_broken: OnBroken = _ignore
        self._directory = local_socket.directory()
        self._path = local_socket.path_in(self._directory, me)
        self._epoll = select.epoll()
        self._listener = local_socket.listen(self._path)
        # Edge-triggered: one that cannot be accepted, for want of files, is not looked at before the next comes.
        self._epoll.register(self._listener, _ONCE)
        self._listens_on = self._listener.fileno()
        self._incoming: dict[int, Incoming] = {}  # by descriptor
        self._by_source: dict[Incarnation, Incoming] = {}
        self._outgoing: dict[int, LocalLink] = {}  # by descriptor
        self._broken: set[Incarnation] = set()  # those that may still send
        self._ready: list[int] = []  # descriptors
        self._closed = False

    @classmethod
    def make(
        cls, me: Incarnation, credentials: Credentials | None = None, *, is_thrifty: bool = False
    ) -> LocalLinks | None:
        """The links of that worker; None, with a warning, where there cannot be any."""
        try:
            return cls(me, credentials, is_thrifty=is_thrifty)
        except OSError as error:
            if _IS_LINUX:
                text = (
                    "workers of this host are reached over TCP, without shared memory, as nothing can listen in %s: %s"
                )
                log.warning(text, local_socket.describe(), str(error))
            return None

    def tell(self, on_broken: OnBroken) -> None:
        """Say who is told, on the thread that reads, of a link whose other end was closed."""
        self._on_broken = on_broken

    # ---- sending: any thread

    def connect(self, peer: Incarnation) -> LocalLink | None:
        """A link to `peer`; None where there is none: it is not of this host, or does not take any."""
        if self._closed or (self._is_thrifty and not descriptors.are_plenty()):
            return None
        try:
            sock = local_socket.connect(local_socket.path_in(self._directory, peer))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                finalizers.defer(partial(log.warning, "a worker of this host is reached over TCP: %s", error))
            return None
        link = LocalLink(peer, sock, self)
        try:
            sock.send(_HELLO + self._me + self._proof(self._me, peer), _NO_SIGNAL)
            self._outgoing[sock.fileno()] = link
            self._epoll.register(sock, _CLOSED)
        except (OSError, ValueError):  # it, or this, was closed meanwhile
            link.close()
            return None
        return link

    def await_room(self, link: LocalLink) -> None:
        """`link` has more to send. For the link."""
        self._modify(link.file, _CLOSED | select.EPOLLOUT)

    def await_closed(self, link: LocalLink) -> None:
        """`link` has nothing to send. For the link."""
        self._modify(link.file, _CLOSED)

    def forget_link(self, link: LocalLink) -> None:
        """`link` is about to be closed. For the link."""
        self._unregister(link.file)
        self._outgoing.pop(link.file, None)

    # ---- receiving: the thread that reads

    def fileno(self) -> int:
        """A descriptor that can be read while there is something to receive or to do."""
        return self._epoll.fileno()

    def is_ready(self) -> bool:
        """Whether there is something to receive, maybe only a connection that begins or ends."""
        if not self._ready:
            events = self._epoll.poll(0)
            if not events:  # as a rule, where a thread polls
                return False
            self._ready = [file for file, _ in events]
        return True

    def receive(self) -> tuple[Incarnation, list[Buffer]] | None:
        """The next message, and who sent it; None if there is none, or none yet. Senders take turns."""
        while self.is_ready():
            file = self._ready.pop()
            incoming = self._incoming.get(file)
            if incoming is not None:
                message = self._receive(incoming)
                if message:
                    return incoming.source, message
            elif file == self._listens_on:
                if not self._accept():
                    break
            else:
                link = self._outgoing.get(file)
                if link is None:
                    self._unregister(file)
                elif link.is_gone():
                    self._break(link)
                    break  # what was told may have closed all of this
                else:
                    link.drain()
        return None

    def forget(self, source: Incarnation) -> list[list[Buffer]]:
        """`source` is gone: what it has sent. Nothing more of it is received, should it live after all."""
        messages: list[list[Buffer]] = []
        incoming = self._by_source.get(source) or self._find(source)
        if incoming is not None:
            while len(messages) < _LAST_MAX and (message := self._receive(incoming)):
                messages.append(message)
            if self._by_source.get(source) is incoming:
                self._drop(incoming)
        return messages

    def close(self) -> None:
        """Receive nothing any more, and be found by no other worker. Links are closed by their owners. Idempotent."""
        self.hide()
        self._closed = True
        self._epoll.close()
        self._listener.close()
        for incoming in self._incoming.values():
            incoming.close()
        self._incoming.clear()
        self._by_source.clear()

    def hide(self) -> None:
        """Be found by no other worker from now on. Idempotent."""
        local_socket.remove(self._path)

    def _find(self, source: Incarnation) -> Incoming | None:
        """The connection of `source`, which may have come and not have been looked at yet."""
        while not self._accept():
            pass
        for incoming in [one for one in self._incoming.values() if not one.source]:
            self._receive(incoming)
        return self._by_source.get(source)

    def _accept(self) -> bool:
        """Take in connections; false if there may be more."""
        for _ in range(_ACCEPTED_MAX):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return True
            except OSError as error:
                text = (
                    "a worker of this host that connects waits, as no file can be opened for it (%s): %s. Raise the "
                    "limit with `ulimit -n`"
                )
                finalizers.defer(partial(log.warning, text, descriptors.describe(), error))
                return True
            incoming = Incoming(sock)
            try:
                local_socket.check_user(sock)
                sock.setblocking(False)
                self._incoming[sock.fileno()] = incoming
                self._epoll.register(sock, select.EPOLLIN)
            except OSError:
                self._drop(incoming)
            if self._is_thrifty and not descriptors.are_plenty():
                self.hide()
        self._modify(self._listens_on, _ONCE)  # look again
        return False

    def _break(self, link: LocalLink) -> None:
        self.forget_link(link)
        if link.peer in self._by_source:
            self._broken.add(link.peer)
        else:
            self._on_broken(link.peer, _BROKEN)

    def _receive(self, incoming: Incoming) -> list[Buffer] | None:
        """The next message of a connection; None: there is none now, or no more."""
        try:
            message = incoming.receive()
            if message is None:
                return None
            if message and incoming.source:
                return message
            if not message or not self._greet(incoming, message):
                self._drop(incoming)
        except ProtocolError as error:
            protocol_errors.received.note("packet", incoming.source.hex() or "a process of this host", error)
            self._drop(incoming)
        except (OSError, ZrpcError) as error:
            finalizers.defer(partial(log_error, log, "the link of %s is closed", incoming.source.hex(), error=error))
            self._drop(incoming)
        return None

    def _greet(self, incoming: Incoming, message: list[Buffer]) -> bool:
        """The first message of a connection came, which says whose it is."""
        hello = bytes(message[0])
        source = hello[len(_HELLO) : len(_HELLO) + INCARNATION_NBYTES]
        if len(source) != INCARNATION_NBYTES or not hello.startswith(_HELLO):
            raise ProtocolError(f"a link begins with {reprlib.repr(hello)}")
        if not hmac.compare_digest(hello, _HELLO + source + self._proof(source, self._me)):
            finalizers.defer(partial(log.warning, "a process of this user that is no member of this group was refused"))
            return False
        if self._credentials is not None and (reason := self._credentials.why_not(source)) is not None:
            finalizers.defer(partial(log.warning, "a process of this user was refused: %s", reason))
            return False
        incoming.say_source(source)
        self._by_source[incoming.source] = incoming
        return True

    def _proof(self, sender: Incarnation, receiver: Incarnation) -> bytes:
        """What `sender` says to `receiver` behind its incarnation."""
        return b"" if self._credentials is None else self._credentials.local_proof(sender, receiver)

    def _drop(self, incoming: Incoming) -> None:
        file = incoming.sock.fileno()
        self._unregister(file)  # closing is not enough: a child that was forked has the connection too
        self._incoming.pop(file, None)
        incoming.close()
        if self._by_source.get(incoming.source) is incoming:
            del self._by_source[incoming.source]
            if incoming.source in self._broken:
                self._broken.remove(incoming.source)
                self._on_broken(incoming.source, _BROKEN)

    def _modify(self, file: int, events: int) -> None:
        with suppress(OSError, ValueError):  # it is closed
            self._epoll.modify(file, events)

    def _unregister(self, file: int) -> None:
        with suppress(OSError, ValueError):  # it never was, or is no more
            self._epoll.unregister(file)


def _ignore(*_: object) -> None:
    """Nothing is to be told yet."""
