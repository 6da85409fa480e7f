"""Keeping up the connection through which others are reached: noticing that it broke, and looking for a broker.

What: the watcher waits for what the sockets say. Where the connection is gone, it has the endpoint see to what that
means, and looks for a broker (`zrpc.transport.brokers`) until one is found, or the time for that is over.

Invariants: `on_break` has returned before a broker is looked for. Others are not sent to between BROKE and RESUMED.

Threads: belongs to the watcher, but for `ask_to_break`, `resume` and `give_up`, which any thread may call. The lock
owns the state.

Failure: a broker that cannot be reached is tried again, in turn with the others.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zrpc.errors import ConfigError
from zrpc.transport import relay_state
from zrpc.transport.broker_connection import Told
from zrpc.transport.relay_state import Event, Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.transport.broker_connection import BrokerConnection, OnReader
    from zrpc.transport.brokers import Finder
    from zrpc.transport.sockets import Socket

log = logging.getLogger("zrpc")

RETRY_MS = 200


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told, on the watcher.

    Attributes:
        on_break: the connection is gone, and why. It returns when all that it means is done.
        on_handshake: a socket was connected.
        on_connected: there is a connection, for the first time or again.
        on_given_up: none was found in time, or the broker does not let this worker in (`True`).
        on_reader: see `OnReader`.
        is_over: whether the endpoint is closed, or the broker given up.
    """

    on_break: Callable[[str], None]
    on_handshake: Callable[[], None]
    on_connected: Callable[[], None]
    on_given_up: Callable[[str, bool], None]
    on_reader: OnReader
    is_over: Callable[[], bool]


class Relaying:
    """The connection to one broker of several.

    Args:
        addresses: the brokers.
        connection: the sockets.
        finder: looks for one of them.
        grace_s: how long one is looked for after a connection broke.
        listeners: see there.

    Attributes:
        address: of the broker that it is connected to, or was, or will be.
    """

    def __init__(
        self, addresses: Sequence[str], connection: BrokerConnection, finder: Finder, grace_s: float,
        listeners: Listeners,
    ) -> None:  # fmt: skip
        self._addresses = addresses
        self._connection = connection
        self._finder = finder
        self._grace_s = grace_s
        self._listeners = listeners
        self.address = addresses[0]
        self._lock = threading.Lock()
        self._state = Relay.FIRST if len(addresses) == 1 else Relay.SEARCHING
        self._last: str | None = None  # the broker of the last connection
        self._broken_at: float | None = None  # and it has not resumed
        self._break_asked: str | None = None

    @property
    def is_searching(self) -> bool:
        """Whether there is no connection, and one is looked for."""
        return self._state is Relay.SEARCHING

    @property
    def is_resumed(self) -> bool:
        """Whether others can be sent to."""
        return self._state in (Relay.FIRST, Relay.UP)

    def ask_to_break(self, reason: str) -> None:
        """The broker does not answer. Wake the watcher after."""
        self._break_asked = reason

    def resume(self) -> bool:
        """The broker has the group together again; false: there is no connection, or there was one all the while."""
        with self._lock:
            if self._state is not Relay.ATTACHED:
                return False
            self._state = relay_state.after(self._state, Event.RESUMED)
            self._broken_at = None
            return True

    def give_up(self) -> None:
        """Look for no broker any more."""
        self._set(Event.GIVEN_UP)

    # ---- the watcher ------------------------------------------------------------------------------------------------

    def watch_once(self, wake: Socket, timeout_ms: int | None, group: str) -> None:
        """Wait for something, or for a message on `wake`, and see to it; or look for a broker of `group` once."""
        if self._state is Relay.SEARCHING:
            self._search_once(wake, group)
            return
        told = self._connection.poll(wake, timeout_ms)
        if self._listeners.is_over():
            return
        if Told.CONNECTED in told:
            self._listeners.on_handshake()
            if self._state is Relay.FIRST and self._connection.is_up:
                self._last = self.address
                self._set(Event.CONNECTED)
        reason = self._break_asked
        if Told.BROKE in told:
            reason = f"the connection to the broker at {self.address} broke"
        if self._connection.refusal is not None:
            self._give_up_refused()
        elif reason is not None:
            self._break(reason)

    def _break(self, reason: str) -> None:
        self._set(Event.BROKE)
        self._break_asked = None
        self._broken_at = self._broken_at or time.monotonic()
        log.warning("%s: workers that it relays to cannot be reached, and a broker is looked for", reason)
        self._connection.detach(self._listeners.on_reader)
        self._listeners.on_break(reason)

    def _search_once(self, wake: Socket, group: str) -> None:
        if self._broken_at is not None and time.monotonic() - self._broken_at > self._grace_s:
            doubt = self._connection.doubt
            text = f"the connection to the broker broke, and for {self._grace_s:g} s there was none"
            text += f" at {', '.join(self._addresses)}" if doubt is None else f" that lets this worker in: {doubt}"
            self._listeners.on_given_up(text, doubt is not None)
            return
        found = self._finder.find(group, self._last)
        try:
            is_attached = found is not None and self._attach(found)
        except ConfigError as error:
            self._listeners.on_given_up(str(error), True)
            return
        if is_attached:
            self._listeners.on_connected()
        elif not self._listeners.is_over() and wake.poll(RETRY_MS):
            wake.recv_multipart()

    def _attach(self, address: str) -> bool:
        self.address = address
        listeners = self._listeners
        if self._connection.attach(address, listeners.on_reader, listeners.is_over):
            self._listeners.on_handshake()
            self._last = address
            self._set(Event.CONNECTED)
            if self._broken_at is None:  # the first one: there is nothing to get together again
                self._set(Event.RESUMED)
            return True
        if not listeners.is_over():
            self._connection.detach(listeners.on_reader)
        if self._connection.refusal is not None:
            self._give_up_refused()
        return False

    def _give_up_refused(self) -> None:
        reason = f"the broker at {self.address} refused this worker: {self._connection.refusal}"
        self._listeners.on_given_up(reason, True)

    def _set(self, event: Event) -> None:
        with self._lock:
            self._state = relay_state.after(self._state, event)
