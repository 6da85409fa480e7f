"""Brokerless transport: every worker listens on one ROUTER and connects one DEALER to each peer it talks to.

Sockets are one-way. The ROUTER is only read, by the reading thread; a DEALER is only sent on, by any thread, under
its lock. An answer travels on the answerer's own DEALER. So a call needs no hop through an I/O thread on its way out,
and no socket is ever polled for both.

A DEALER's routing id is its worker's incarnation: the ROUTER's source frame says who sent, and two lives of one worker
are never mistaken for each other. Where workers have keys of their own, bytes that only the receiver sees follow it,
so that no other member can take the connection over (ROUTER_HANDOVER), and the key says whether the incarnation is the
sender's (`zrpc.transport.senders`). Once a second the keyring is looked at, and peers whose keys were revoked are lost.

Connections are made when the first message is sent. Workers of one host have local
links instead, where both may have them.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING

import zmq

from zrpc import finalizers
from zrpc.config import DEFAULT_LIVENESS_TIMEOUT_S
from zrpc.errors import ConfigError, PeerLostError
from zrpc.transport import descriptors, sockets
from zrpc.transport.credentials import Authenticator, keyring_of
from zrpc.transport.credit import CreditLink
from zrpc.transport.link_endpoint import LinkEndpoint
from zrpc.transport.local_links import FILES_PER_PEER
from zrpc.transport.senders import Senders
from zrpc.transport.socket_link import SocketLink
from zrpc.transport.watch import EVENTS, ConnectionWatch

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.keyring import Keyring
    from zrpc.transport.credentials import Credentials
    from zrpc.transport.endpoint import OnFrames, OnLost
    from zrpc.transport.inbox import Work
    from zrpc.transport.link import Link
    from zrpc.wire.envelope import Buffer


CREDIT_NBYTES = 512 << 20
"""What may be on the way to one peer that has not read it. ZeroMQ holds references to memory that the message's sender
holds as well: this only bounds answers."""
HIDDEN_NBYTES = 8
KEYS_INTERVAL_MS = 1_000
"""How often the keyring is looked at."""

log = logging.getLogger("zrpc")


class PeerEndpoint(LinkEndpoint):
    """One worker's end of the brokerless transport.

    Args:
        incarnation: this life of the worker.
        bind: address to listen on, such as `tcp://127.0.0.1:0`.
        local: have links with workers of this host.
        busy_poll_s: see `Polling`.
        credentials: what it proves itself with, and whom it lets in; None: nothing, and anybody.
        liveness_s: how long the host of another worker may be silent.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self, incarnation: Incarnation, bind: str, *, local: bool = False, busy_poll_s: float = 0.0,
        credentials: Credentials | None = None, liveness_s: float = DEFAULT_LIVENESS_TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._bind = bind
        self._liveness_s = liveness_s
        self._authenticator: Authenticator | None = None
        self._on_frames: OnFrames
        self._on_lost: OnLost
        keyring = keyring_of(credentials)
        self._keyring = keyring
        senders = None if keyring is None else Senders(keyring, _warn)
        self._complaint: str | None = None  # of the keyring, that was logged
        self._keys_due = 0.0
        super().__init__(
            incarnation, self._make_router, local=local, is_thrifty=False, busy_poll_s=busy_poll_s, wake=[b""],
            credentials=credentials, check=None if senders is None else senders.checked,
        )  # fmt: skip
        if self._local_links is not None:
            self._local_links.tell(self._declare_lost)
        self._watch: ConnectionWatch[Incarnation] = ConnectionWatch(self._watcher_end, self._authenticator, liveness_s)
        self._addresses: dict[Incarnation, str] = {}
        self._new_monitors: list[tuple[Incarnation, sockets.Socket]] = []

    def local_ports(self) -> set[int]:
        """See `fork.Connected`."""
        return {sockets.split_address(self.address)[1]}

    def remote_addresses(self) -> set[tuple[str, int]]:
        """See `fork.Connected`."""
        return {sockets.split_address(address) for address in self._addresses.values()}

    def start(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        """Begin to read; see `Endpoint.start`."""
        self._on_frames, self._on_lost = on_frames, on_lost
        self._begin()

    def connect(self, peer: Incarnation, address: str) -> None:
        """Say where `peer` listens; the connection is made with the first message to it."""
        with self._lock:
            self._addresses.setdefault(peer, address)

    add_peer = connect
    """See `Endpoint.add_peer`."""

    def remove_peer(self, peer: Incarnation, reason: str) -> bool:
        """See `Endpoint.remove_peer`."""
        del reason
        was_known = peer in self._addresses
        self.disconnect(peer)
        return was_known

    def disconnect(self, peer: Incarnation) -> None:
        """Forget a peer that said goodbye; what was sent to it may still leave."""
        with self._lock:
            self._addresses.pop(peer, None)
            self._gone.note(peer, "it left the group")
            self._owed.pop(peer, None)
            link = self._links.pop(peer, None)
        if link is not None:
            link.close(linger_s=1.0)

    def watch(self, peer: Incarnation) -> None:
        """Connect to `peer` now; see `Endpoint.watch`."""
        if peer in self._links:
            return
        try:
            self._open(peer)
        except PeerLostError:
            self._on_lost(peer, self._why_gone(peer))

    def _make_router(self, context: sockets.Context) -> sockets.Socket:
        if self._credentials is not None:
            self._authenticator = Authenticator(context, self._credentials)
        router = sockets.make_socket(context, zmq.ROUTER, heartbeats=False, liveness_s=self._liveness_s)
        # A peer connects again while this process stands still, for which the connection before is still there: without
        # this the new one would be taken in and never read.
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.ROUTING_ID, self.incarnation)  # so that it can be seen which life listens: `has_ended`
        self.address = sockets.bind(router, self._bind, self._credentials)
        return router

    def _open(self, peer: Incarnation) -> Link:
        with self._lock:
            existing = self._links.get(peer)
            if existing is not None:
                return existing
            address = self._addresses.get(peer)
            if self._closed or peer in self._gone or address is None:
                raise self._refusal(peer)
            link = self._links[peer] = self._open_local(peer) or self._open_socket(peer, address)
            return link

    def _open_local(self, peer: Incarnation) -> Link | None:
        if self._local_links is None:
            return None
        descriptors.check_room(FILES_PER_PEER)
        return self._local_links.connect(peer)

    def _open_socket(self, peer: Incarnation, address: str) -> Link:
        """A DEALER that is connected to `peer`. Call it under the lock."""
        identity = self.incarnation if self._keyring is None else self.incarnation + os.urandom(HIDDEN_NBYTES)
        sock = sockets.make_socket(
            self._context, zmq.DEALER, identity=identity, heartbeats=False, liveness_s=self._liveness_s
        )
        try:
            monitor = sockets.make_monitor(self._context, sock, EVENTS)
        except zmq.ZMQError:
            sock.close()
            raise
        try:
            sockets.connect(sock, address, self._credentials, peer)
        except ConfigError as error:
            self._gone.note(peer, f"its address cannot be used: {error}")
            sock.disable_monitor()  # its last word must be sent while somebody is there to read it
            sock.close()
            monitor.close()
            raise self._refusal(peer) from error
        self._new_monitors.append((peer, monitor))
        self._wake(self._watcher_wake)
        return CreditLink(SocketLink(sock, self._on_queued), CREDIT_NBYTES)

    def _take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        if self._closed or (len(frames) == 1 and not frames[0]):  # it only wakes the reader
            return None
        if self._is_mark(source, frames):
            return None
        return self._on_frames(source, frames)

    def _watch_once(self) -> None:
        timeout_ms = self._drain_interval_ms
        if self._keyring is not None and timeout_ms is None:
            timeout_ms = KEYS_INTERVAL_MS
        self._watch.poll(timeout_ms, self._declare_lost)
        self._watch_new()
        if self._keyring is not None and time.monotonic() >= self._keys_due:
            self._keys_due = time.monotonic() + KEYS_INTERVAL_MS / 1000
            self._look_at_keys(self._keyring)

    def _look_at_keys(self, keyring: Keyring) -> None:
        """Read the keyring again if it has changed; those that it does not let in any more are lost."""
        keyring.reload()
        if keyring.complaint != self._complaint and keyring.complaint is not None:
            _warn(f"the keyring has changed, and what it said before holds: {keyring.complaint}")
        self._complaint = keyring.complaint
        own = keyring.why_not(self.incarnation)
        for peer in [one for one in list(self._addresses) if one != self.incarnation]:
            reason = keyring.why_not(peer) or (own and f"this worker is a member no more, as {own}")
            if reason:
                self._lose_revoked(peer, reason)

    def _lose_revoked(self, peer: Incarnation, reason: str) -> None:
        """Nothing that `peer` sends is taken from now on."""
        self._revoked.add(peer)
        with self._lock:
            was_known = self._addresses.pop(peer, None) is not None and peer not in self._gone
            self._gone.note(peer, reason)
            self._owed.pop(peer, None)
            link = self._links.pop(peer, None)
        if link is not None:
            link.close(linger_s=0.0)
        if was_known:
            self._on_lost(peer, reason)

    def _watch_new(self) -> None:
        with self._lock:
            added, self._new_monitors = self._new_monitors, []
        for peer, monitor in added:
            self._watch.add(peer, monitor)

    def _wait_sent(self, deadline: float) -> None:
        self._watch_new()
        self._watch.wait_closed(deadline)

    def _close_monitors(self) -> None:
        self._watch_new()
        self._watch.close()
        if self._authenticator is not None:
            self._authenticator.close()

    def _declare_lost(self, peer: Incarnation, reason: str) -> None:
        with self._lock:
            link = self._links.pop(peer, None)
            if link is None:
                return
            self._addresses.pop(peer, None)
            self._gone.note(peer, reason)
            self._owed.pop(peer, None)
        link.close(linger_s=0.0)
        self._on_lost(peer, reason)


def _warn(text: str) -> None:
    """Log what the thread that reads has found."""
    finalizers.defer(partial(log.warning, "%s", text))
