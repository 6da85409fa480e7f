"""The broker's side of the brokered transport: one ROUTER that relays frames between workers without reading them.

Theory of operation. `zrpc.transport.identities` says which connections there are, and what comes on them.

- Frames between workers pass as they came (`copy=False`); only members of one room reach each other.
- `ROUTER_MANDATORY` makes both kinds of trouble visible: EHOSTUNREACH means that the receiver's connection is gone,
  and with it the worker; EAGAIN that it is at its high-water mark, and then messages wait in a backlog that is counted
  in bytes. A worker whose backlog passes its limit is given up (`Unreachable`): nothing is dropped without word of it.
- Where workers have keys of their own, each message is one of the worker whose key its connection has proved, or is
  dropped (`zrpc.transport.senders`).
- A newer connection of a worker counts once the older one is gone (`zrpc.transport.contests`).
- A ROUTER does not say who went away. Its monitor says that somebody did (`Hint`), and the broker then probes.

One thread owns a `Hub`; only `wake` may be called from others, and from a signal handler.
"""

from __future__ import annotations

import contextlib
import logging
import reprlib
import socket as pysocket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq

from zrpc import protocol_errors
from zrpc.transport import descriptors, sockets
from zrpc.transport.contests import LOOK_S, Contests
from zrpc.transport.credentials import Authenticator, keyring_of
from zrpc.transport.hub_events import Control, Event, Hello, Hint, Question, Replaced, Undelivered, Unreachable
from zrpc.transport.identities import ASKER, BROKER, END, IDENTITY_NBYTES, RECEIVER, SENDER, SOURCE
from zrpc.transport.senders import Senders
from zrpc.transport.silence import is_gone

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials
    from zrpc.wire.envelope import Buffer

BACKLOG_MAX_NBYTES = 256 << 20
CONTROL_MAX_NBYTES = 1 << 20
"""Of a message to the broker: the broker keeps what a worker says of itself, and sends it to all others."""
BATCH = 256
"""Messages taken in one `pump`: the broker looks at its clock at least this often."""
RETRY_MS = 2
"""A backlog is tried again this often: a ROUTER cannot be waited on for one peer."""

_NOW = zmq.NOBLOCK
_NOW_MORE = zmq.NOBLOCK | zmq.SNDMORE

_log = logging.getLogger(__name__)


Frames = Sequence["Buffer | zmq.Frame"]


@dataclass(slots=True, eq=False)
class _Peer:
    incarnation: Incarnation
    end: bytes = b""  # of the identities of its newest connection
    said_hello: bool = False
    file: int | None = None  # of the connection
    room: dict[Incarnation, _Peer] | None = None
    backlog: deque[tuple[bytes, Frames]] = field(default_factory=deque)
    backlog_nbytes: int = 0
    held: deque[tuple[bytes, Frames]] | None = None  # while it is to come back: what others sent it
    held_nbytes: int = 0
    receiver: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.receiver = RECEIVER + self.incarnation + self.end

    def begin(self, end: bytes) -> None:
        """There is no connection, but perhaps the one with that end."""
        self.end, self.receiver = end, RECEIVER + self.incarnation + end
        self.said_hello, self.file, self.backlog_nbytes = False, None, 0
        self.backlog.clear()


class Hub:
    """The ROUTER, who may reach whom through it, and what waits for slow workers.

    Args:
        address: where to listen, `tcp://host:port`; port 0 takes any free one.
        credentials: who may connect; None: anybody.
        backlog_max_nbytes: a worker that lets more than this wait is given up.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self, address: str, credentials: Credentials | None, backlog_max_nbytes: int = BACKLOG_MAX_NBYTES
    ) -> None:
        self._context = sockets.make_context()
        self._authenticator = None if credentials is None else Authenticator(self._context, credentials)
        keyring = keyring_of(credentials)
        self._senders = None if keyring is None else Senders(keyring, _log.warning)
        self._router = sockets.make_socket(self._context, zmq.ROUTER)
        try:
            self.address = sockets.bind(self._router, address, credentials)
        except BaseException:
            self._context.destroy()
            raise
        self._monitor = sockets.make_monitor(self._context, self._router, zmq.EVENT_DISCONNECTED)
        self._wake_in, self._wake_out = pysocket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._poller = zmq.Poller()
        for readable in (self._router, self._monitor, self._wake_out):
            self._poller.register(readable, zmq.POLLIN)
        if self._authenticator is not None:
            self._poller.register(self._authenticator.sock, zmq.POLLIN)
        self._backlog_max_nbytes = backlog_max_nbytes
        self._peers: dict[Incarnation, _Peer] = {}
        self._rooms: dict[int, dict[Incarnation, _Peer]] = {}
        self._clogged: set[_Peer] = set()
        self._contests = Contests()
        self._active: set[Incarnation] = set()
        self._events: list[Event] = []
        self._has_warned = False

    def pump(self, timeout_ms: int) -> list[Event]:
        """Relay what is there, waiting up to `timeout_ms` for something; returns what the broker must see to."""
        if self._clogged:
            timeout_ms = min(timeout_ms, RETRY_MS)
        elif self._contests:
            timeout_ms = min(timeout_ms, int(LOOK_S * 1000))
        taken = self._take_batch()
        if not taken and not self._events:
            ready = dict(self._poller.poll(timeout_ms))
            if self._wake_out.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_out.recv(4096)
            self._take_batch()
        self._read_monitor()
        if self._authenticator is not None:
            self._authenticator.answer()
        for peer in list(self._clogged):
            self._retry(peer)
        for origin, frame, parts in self._contests.take_due() if self._contests else ():
            self._take(origin, frame, parts, is_kept=True)
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """Let a waiting `pump` return now. Any thread, or a signal handler."""
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")

    def has_said_hello(self, peer: Incarnation) -> bool:
        """Whether messages to `peer` can arrive."""
        known = self._peers.get(peer)
        return known is not None and known.said_hello

    def is_host_gone(self, peer: Incarnation, for_s: float) -> bool:
        """Whether the host of `peer` has acknowledged nothing for so long, though it was sent something."""
        known = self._peers.get(peer)
        return known is not None and is_gone(known.file, for_s)

    def take_active(self) -> set[Incarnation]:
        """Who sent anything since the last call."""
        active, self._active = self._active, set()
        return active

    def admit(self, incarnation: Incarnation, room: int) -> None:
        """Let a worker reach, and be reached by, the others in `room`."""
        peer = self._peer(incarnation)
        peer.room = self._rooms.setdefault(room, {})
        peer.room[incarnation] = peer

    def expect(self, incarnation: Incarnation, room: int) -> None:
        """As `admit`, for a worker that is to come back: what it is sent is kept until `release`."""
        peer = self._peer(incarnation)
        if peer.room is None:
            self.admit(incarnation, room)
            peer.held = deque()

    def release(self, incarnation: Incarnation) -> None:
        """Send a worker what was kept for it."""
        peer = self._peer(incarnation)
        held, peer.held, peer.held_nbytes = peer.held or (), None, 0
        for source, frames in held:
            if self._peers.get(incarnation) is peer:  # else it was given up
                self._push(peer, source, frames)

    def dismiss(self, incarnation: Incarnation) -> None:
        """The opposite of `admit` and `expect`."""
        peer = self._peers.get(incarnation)
        if peer is None or peer.room is None:
            return
        del peer.room[incarnation]
        peer.room, peer.held, peer.held_nbytes = None, None, 0
        self._rooms = {key: room for key, room in self._rooms.items() if room}

    def forget(self, incarnation: Incarnation) -> None:
        """Drop all that is known of a worker, its backlog included."""
        self.dismiss(incarnation)
        peer = self._peers.pop(incarnation, None)
        if peer is not None:
            self._clogged.discard(peer)

    def send(self, to: Incarnation, frames: Frames) -> None:
        """Send a message of the broker's own. A destination that is gone comes back as an event."""
        self._push(self._peer(to), BROKER, frames)

    def answer(self, asker: bytes, frames: Frames) -> None:
        """Answer a `Question`. Dropped if the one who asked does not wait for it any more."""
        with contextlib.suppress(zmq.ZMQError):  # it is gone, or reads nothing
            self._router.send_multipart([asker, BROKER, *frames], _NOW)

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        if self._context.closed:
            return
        self._context.destroy(linger=0)
        self._wake_in.close()
        self._wake_out.close()

    def _peer(self, incarnation: Incarnation) -> _Peer:
        return self._peers.get(incarnation) or self._peers.setdefault(incarnation, _Peer(incarnation))

    def _newest(self, source: Incarnation, end: bytes) -> _Peer | None:
        """The worker, if the connection with that end counts, or now does; None: another one does."""
        peer = self._peers.get(source)
        if peer is not None and end > peer.end:
            if peer.held is not None or not peer.said_hello:  # nothing was told to the one before
                peer.begin(end)
            elif self._is_there(peer):
                return None
            else:
                self._events.append(Replaced(source))
                self.forget(source)
                peer = None
        if peer is None:
            peer = self._peers[source] = _Peer(source, end)
        return peer if peer.end == end else None

    def _is_there(self, peer: _Peer) -> bool:
        """Whether its connection is, as far as is known: it is sent a message that says nothing."""
        try:
            self._router.send_multipart([peer.receiver, BROKER, b""], _NOW)
        except zmq.Again:
            return True
        except zmq.ZMQError:
            return False
        return True

    def _take_batch(self) -> int:
        for taken in range(BATCH):
            if not self._take_one():
                return taken
        return BATCH

    def _take_one(self) -> bool:
        recv = self._router.recv
        try:
            frame = recv(_NOW, copy=False)
        except zmq.Again:
            return False
        origin = frame.bytes
        parts: list[zmq.Frame] = []
        while frame.more:
            frame = recv(_NOW, copy=False)
            parts.append(frame)
        if len(origin) not in IDENTITY_NBYTES or origin[:1] not in (SENDER, RECEIVER, ASKER) or not parts:
            text = f"{len(parts)} frames came, and not from a zrpc worker"
            protocol_errors.received.note("message", reprlib.repr(origin), text, at_once=True)
        elif self._senders is None or self._senders.is_from(origin[SOURCE], frame):
            self._take(origin, frame, parts)
        return True

    def _take(self, origin: bytes, frame: zmq.Frame, parts: list[zmq.Frame], *, is_kept: bool = False) -> None:
        source, end = origin[SOURCE], origin[END]
        if origin[:1] == ASKER:
            if (frames := self._control_frames(source, parts)) is not None:
                self._events.append(Question(origin, frames))
            return
        peer = self._peers.get(source)
        if peer is None or peer.end != end:
            known = peer
            if is_kept or not self._contests.has(source):
                peer = self._newest(source, end)
            if peer is None or peer.end != end:
                if known is not None and end > known.end:
                    self._contests.add(source, (origin, frame, parts))
                return
        if origin[:1] == SENDER:
            self._active.add(source)
            self._route(peer, parts)
        else:
            peer.said_hello, peer.file = True, int(frame.get(zmq.SRCFD))
            self._events.append(Hello(source))
            self._check_room()

    def _check_room(self) -> None:
        """Say so before there is no room: ZeroMQ refuses connections without a word."""
        if not self._has_warned and descriptors.is_scarce():
            self._has_warned = True
            _log.warning(
                "soon no worker can connect any more: %s, and each worker needs 2. Raise the limit with `ulimit -n`",
                descriptors.describe(),
            )

    def _route(self, known: _Peer, parts: list[zmq.Frame]) -> None:
        source = known.incarnation
        destination = parts.pop(0).bytes
        if destination == BROKER:
            if (frames := self._control_frames(source, parts)) is not None:
                self._events.append(Control(source, frames))
            return
        peer = None if known.room is None else known.room.get(destination)
        if peer is None:
            self._events.append(Undelivered(source, destination))
        elif peer.held is not None:
            self._hold(peer, peer.held, source, parts)
        elif parts:
            self._push(peer, source, parts)

    def _control_frames(self, source: Incarnation, parts: list[zmq.Frame]) -> list[Buffer] | None:
        """A message to the broker; None: it is dropped."""
        if sum(map(len, parts)) > CONTROL_MAX_NBYTES:
            text = "it is for the broker, and too large for that"
            protocol_errors.received.note("message", source.hex(), text, at_once=True)
            return None
        frames: list[Buffer] = [part.bytes for part in parts]
        return frames if any(frames) else None  # an interrupted sender left it behind (`socket_link.send_frames`)

    def _hold(self, peer: _Peer, held: deque[tuple[bytes, Frames]], source: bytes, frames: Frames) -> None:
        held.append((source, frames))
        peer.held_nbytes += _nbytes(frames)
        self._check_size(peer, peer.held_nbytes, "it is not back")

    def _push(self, peer: _Peer, source: bytes, frames: Frames) -> None:
        if not peer.backlog and self._try_send(peer, source, frames):
            return
        peer.backlog.append((source, frames))
        peer.backlog_nbytes += _nbytes(frames)
        self._clogged.add(peer)
        self._check_size(peer, peer.backlog_nbytes, "it is too slow")

    def _check_size(self, peer: _Peer, nbytes: int, why: str) -> None:
        if nbytes > self._backlog_max_nbytes:
            limit_mb = self._backlog_max_nbytes >> 20
            self._give_up(peer, f"{why}: more than {limit_mb} MiB wait for it at the broker")

    def _try_send(self, peer: _Peer, source: bytes, frames: Frames) -> bool:
        """False: at its high-water mark. True: sent, or the peer is gone and an event says so."""
        send = self._router.send
        try:
            send(peer.receiver, _NOW_MORE)
            send(source, _NOW_MORE)
            last = len(frames) - 1
            for index, frame in enumerate(frames):
                send(frame, _NOW if index == last else _NOW_MORE, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if peer.held is not None:  # it is to come back, and may try again
                peer.begin(peer.end)
            else:
                self._give_up(peer, "its connection to the broker is gone")
        return True

    def _retry(self, peer: _Peer) -> None:
        while peer.backlog:
            source, frames = peer.backlog[0]
            if not self._try_send(peer, source, frames):
                return
            if not peer.backlog:
                break
            peer.backlog.popleft()
            peer.backlog_nbytes -= _nbytes(frames)
        self._clogged.discard(peer)

    def _give_up(self, peer: _Peer, reason: str) -> None:
        peer.backlog.clear()
        peer.backlog_nbytes = 0
        self.forget(peer.incarnation)
        self._events.append(Unreachable(peer.incarnation, reason))

    def _read_monitor(self) -> None:
        """One kind of event is asked for, so what it says need not be read."""
        gone = False
        with contextlib.suppress(zmq.Again):
            while True:
                self._monitor.recv_multipart(_NOW)
                gone = True
        if gone:
            self._events.append(Hint())


def _nbytes(frames: Frames) -> int:
    return sum(len(frame) for frame in frames)
