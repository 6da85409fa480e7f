"""Noticing that a connection is gone: ZeroMQ's socket monitors, judged.

A monitor's events are hints. What they mean here: a connection that breaks and cannot be made again at once
(`REFUSALS` attempts in a row end without one, or one gets no answer for `liveness_s`) has no process behind it any
more. One that breaks and comes back is none of our business. One that stays up, and whose other end acknowledges
nothing for `liveness_s`, has no host behind it (`zrpc.transport.silence`).
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import zmq

from zrpc.config import DEFAULT_LIVENESS_TIMEOUT_S
from zrpc.transport.silence import account_of
from zrpc.transport.sockets import receive_full_event, split_address

if TYPE_CHECKING:
    from zrpc.transport.credentials import Authenticator
    from zrpc.transport.sockets import Socket

EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_MONITOR_STOPPED
)
REFUSALS = 3
UNANSWERED_SHARE = 0.8
"""An attempt to connect that ended after this share of the time limit, or later, got no answer: it was not refused."""
LOOKS = 5
"""So often in the time for which a host may be silent it is looked whether one is."""
LOOK_MAX_S = 1.0
DENIALS = 3
"""So many handshakes in a row that fail at once and without a reason were not broken off by chance."""
AT_ONCE_S = 1.0
"""A handshake that lasts longer was not denied: the other process stands still, or is busy."""
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
_DENIED = (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_AUTH)

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class ConnectionState:
    """What the events of one connection add up to. Pure: events in, verdict out.

    Attributes:
        liveness_s: how long its host may be silent.
        descriptor: of the TCP connection while there is one, else -1.
        port: of its other end.
    """

    liveness_s: float = DEFAULT_LIVENESS_TIMEOUT_S
    was_up: bool = False
    refusals: int = 0
    denials: int = 0
    connected_at: float = 0.0
    tried_at: float | None = None
    descriptor: int = -1
    port: int = 0

    def on_event(self, event: int, now: float, value: int = -1, address: str = "") -> str | None:
        """Take in one monitor event, which came at `now` (seconds); the reason why the peer is gone, if it now is."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.was_up, self.refusals, self.denials = True, 0, 0
        elif event == zmq.EVENT_CONNECT_DELAYED:
            self.tried_at = now
        elif event == zmq.EVENT_CONNECTED:
            self.connected_at = now
            if value >= 0 and address:
                self.descriptor, self.port = value, split_address(address)[1]
        elif event == zmq.EVENT_DISCONNECTED:
            self.descriptor = -1
        elif event in HANDSHAKE_FAILED:
            self.denials += now - self.connected_at < AT_ONCE_S
            if self.denials >= DENIALS or event in _DENIED:
                return (
                    "what listens at its address has another secret than this process, or none (insecure), or is no "
                    "zrpc of this version: give all workers, and the broker, the same ZRPC_SECRET. Where workers have "
                    "keys (ZRPC_KEYS): or its keyring does not list this worker's key, or has it revoked"
                )
        elif event == zmq.EVENT_CLOSED:
            self.descriptor = -1
            tried_at, self.tried_at = self.tried_at, None
            if tried_at is not None and now - tried_at >= UNANSWERED_SHARE * self.liveness_s:
                return f"its host gives no answer for {self.liveness_s:g} s: it is off, or the network to it is cut"
            self.refusals += 1
            if self.refusals >= REFUSALS:
                return "its connection broke and is refused" if self.was_up else "nobody listens at its address"
        return None

    def on_look(self) -> str | None:
        """Look what the kernel says of the connection; the reason why the peer is gone, if it now is."""
        account = account_of(self.descriptor, self.port) if self.descriptor >= 0 else None
        if account is None or not account.is_silent(self.liveness_s):
            return None
        return (
            f"its host has acknowledged nothing for {account.acknowledged_ms / 1000:.1f} s (liveness_timeout is "
            f"{self.liveness_s:g} s): it is off, or the network to it is cut"
        )


class ConnectionWatch(Generic[K]):
    """Watches the outgoing connections of an endpoint, and decides on those that come in.

    Owned by the one thread that calls `poll`.

    ZeroMQ's own poller looks at every socket each time one has something to say: where 128 peers connected in the same
    second, it took this thread 350 µs a connection. The system's selector looks at those alone that have: 185 µs. A
    ZeroMQ descriptor is readable when something *may* have changed, and then only once, so who finds it readable reads
    its socket until nothing is left.
    """

    def __init__(
        self,
        wake: Socket,
        authenticator: Authenticator | None = None,
        liveness_s: float = DEFAULT_LIVENESS_TIMEOUT_S,
    ) -> None:
        self._liveness_s = liveness_s
        self._look_interval_s = min(LOOK_MAX_S, liveness_s / LOOKS)
        self._look_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake = wake
        self._authenticator = authenticator
        self._watched: dict[Socket, tuple[K, ConnectionState]] = {}
        self._new = [wake]
        self._selector.register(wake.fileno(), selectors.EVENT_READ, wake)
        if authenticator is not None:
            self._new.append(authenticator.sock)
            self._selector.register(authenticator.sock.fileno(), selectors.EVENT_READ, authenticator.sock)

    def add(self, key: K, monitor: Socket) -> None:
        """Watch one more connection, by its monitor socket."""
        self._watched[monitor] = (key, ConnectionState(self._liveness_s))
        self._selector.register(monitor.fileno(), selectors.EVENT_READ, monitor)
        self._new.append(monitor)

    def poll(self, timeout_ms: int | None, on_gone: Callable[[K, str], None]) -> None:
        """Wait for events, or for a wake message, up to `timeout_ms`; call `on_gone` for each peer found gone.

        `on_gone` closes the connection's socket. Its monitor is read until it says so: the socket's last word waits
        for ever if nobody is there to read it, and with it ZeroMQ's thread that closes sockets.
        """
        if self._watched:
            look_ms = int(self._look_interval_s * 1000)
            timeout_ms = look_ms if timeout_ms is None else min(timeout_ms, look_ms)
        new, self._new = self._new, []  # what they had to say at first may have been announced already
        timeout_s = None if timeout_ms is None else timeout_ms / 1000
        if any(sock.poll(0) for sock in new):
            timeout_s = 0.0
        ready: list[Socket] = [key.data for key, _ in self._selector.select(timeout_s)]
        for sock in dict.fromkeys([*new, *ready]):
            if sock.closed:  # by what `on_gone` did
                return
            if sock is self._wake:
                self._take_wake()
            elif self._authenticator is not None and sock is self._authenticator.sock:
                self._authenticator.answer()
            else:
                self._take_events(sock, on_gone)
        self._look(on_gone)

    def _look(self, on_gone: Callable[[K, str], None]) -> None:
        """From time to time, look whether hosts have fallen silent."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + self._look_interval_s
        for key, state in list(self._watched.values()):
            reason = state.on_look()
            if reason is not None:
                state.descriptor = -1
                on_gone(key, reason)

    def _take_wake(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._wake.recv(zmq.NOBLOCK)

    def _take_events(self, monitor: Socket, on_gone: Callable[[K, str], None]) -> None:
        key, state = self._watched[monitor]
        with contextlib.suppress(zmq.Again):
            while True:
                event, value, address = receive_full_event(monitor, zmq.NOBLOCK)
                if event == zmq.EVENT_MONITOR_STOPPED:  # the connection was closed on this side
                    self._drop(monitor)
                    return
                reason = state.on_event(event, time.monotonic(), value, address)
                if reason is not None:
                    on_gone(key, reason)

    def _drop(self, monitor: Socket) -> None:
        self._selector.unregister(monitor.fileno())
        del self._watched[monitor]
        monitor.close()

    def wait_closed(self, deadline: float) -> None:
        """Wait until every watched connection was closed on this side and has nothing left to send, up to `deadline`.

        ZeroMQ closes a socket in the background, and says so on its monitor when it is done.
        """
        while self._watched and (left_s := deadline - time.monotonic()) > 0:
            self.poll(int(left_s * 1000) + 1, _ignore)

    def close(self) -> None:
        """Close every monitor socket. Idempotent."""
        for monitor in list(self._watched):
            self._drop(monitor)
        self._selector.close()


def _ignore(*_: object) -> None:
    """This side has closed them."""
