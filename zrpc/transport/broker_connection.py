"""The connection of a worker to a broker: two sockets, which may be connected anew, to the same broker or another one.

What: a worker sends on one DEALER and receives on another (`zrpc.transport.identities`). The one that sends is made for
each connection. The one that receives stays, as the reading thread reads it; it is disconnected and connected by that
thread.

Invariants: a connection that broke is not made again by ZeroMQ, behind whose back messages would be lost: it is let go
of (`detach`), and the next one has identities of its own.

Threads: belongs to the watcher, but for `receiver`, which is the reader's, and `link`, which any thread may use.

Failure: `attach` says why there is no connection.
"""

from __future__ import annotations

import contextlib
import time
from enum import Enum, auto
from typing import TYPE_CHECKING

import zmq

from zrpc.transport import sockets
from zrpc.transport.identities import END_NBYTES, RECEIVER, SENDER
from zrpc.transport.silence import is_gone
from zrpc.transport.socket_link import SocketLink
from zrpc.transport.watch import EVENTS, HANDSHAKE_FAILED, ConnectionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials

    OnReader = Callable[[Callable[[], None]], bool]
    """Has the reading thread do something, and waits until it has; false: that thread has ended."""

ATTACH_S = 3.0
CLOSE_S = 5.0
_LOOK_MS = 100
_MONITORED = EVENTS | zmq.EVENT_MONITOR_STOPPED


class Told(Enum):
    """What the monitors of the sockets say."""

    CONNECTED = auto()
    BROKE = auto()


class BrokerConnection:
    """The two sockets.

    Args:
        context: makes them.
        incarnation: whose they are.
        credentials: what it proves itself with.
        on_queued: see `SocketLink`.

    Attributes:
        receiver: where messages come.
        link: sends to the broker.
        refusal: why the broker does not let this worker in; None: it does, as far as is known.
        doubt: the same, of one that may also have been about to die; None: the last connection was made.
    """

    def __init__(
        self, context: sockets.Context, incarnation: Incarnation, credentials: Credentials | None,
        on_queued: Callable[[SocketLink], None],
    ) -> None:  # fmt: skip
        self._context = context
        self._incarnation = incarnation
        self._credentials = credentials
        self._on_queued = on_queued
        self.receiver = sockets.make_socket(context, zmq.DEALER)
        self._receiver_monitor = sockets.make_monitor(context, self.receiver, _MONITORED)
        self._endpoint: str | None = None  # of the receiver
        self._file: int | None = None  # of the connection that it sends on
        sender = sockets.make_socket(context, zmq.DEALER)
        self._sender_monitor = sockets.make_monitor(context, sender, _MONITORED)
        self.link = SocketLink(sender, on_queued)
        self._sender = sender
        self._polled: list[sockets.Socket] = []
        self._was_up = False  # at any time
        self.doubt: str | None = None
        self._number = 0  # of the connection: how many were tried before
        self._poller = zmq.Poller()
        self._begin()

    @property
    def is_up(self) -> bool:
        """Whether both sockets are connected."""
        return self._num_up == 2

    def is_host_gone(self, for_s: float) -> bool:
        """Whether the broker's host has acknowledged nothing for so long, though it was sent something. Any thread."""
        return is_gone(self._file, for_s)

    def connect(self, address: str) -> None:
        """Connect for the first time, before there is a reader. ZeroMQ goes on trying until the broker is there.

        Raises:
            ConfigError: the address is not one, or the worker has no key that is valid.
        """
        self._sender.setsockopt(zmq.ROUTING_ID, SENDER + self._incarnation)
        sockets.connect(self._sender, address, self._credentials)
        self._connect_receiver(address, b"")

    def attach(self, address: str, on_reader: OnReader, is_over: Callable[[], bool]) -> bool:
        """Connect again, within `ATTACH_S`; false: there is no connection. After `detach`.

        Raises:
            ConfigError: as `connect`.
        """
        self._number += 1
        end = self._number.to_bytes(END_NBYTES, "big")
        self._close_sender()
        self._begin()
        sender = sockets.make_socket(self._context, zmq.DEALER, SENDER + self._incarnation + end)
        self._sender_monitor = sockets.make_monitor(self._context, sender, _MONITORED)
        self._sender, self.link = sender, SocketLink(sender, self._on_queued)
        self._drain_events()
        errors: list[Exception] = []

        def connect_receiver() -> None:
            try:
                self._connect_receiver(address, end)
            except Exception as error:  # the watcher is to know
                errors.append(error)

        sockets.connect(sender, address, self._credentials)
        if not on_reader(connect_receiver):
            return False
        if errors:
            raise errors[0]
        deadline = time.monotonic() + ATTACH_S
        while not self.is_up and self.refusal is None and not is_over() and time.monotonic() < deadline:
            if Told.BROKE in self.poll(None, _LOOK_MS):  # what ZeroMQ makes of it by itself is another connection
                return False
        return self.is_up

    def detach(self, on_reader: OnReader) -> None:
        """Let go of the connection; what was given to it and has not left is dropped."""
        self._close_sender()
        self._num_up, self._file = 0, None
        on_reader(self._disconnect_receiver)

    def poll(self, wake: sockets.Socket | None, timeout_ms: int | None) -> set[Told]:
        """Wait for what monitors say, or for a message on `wake`, which is read."""
        monitors = [self._receiver_monitor]
        if not self._sender_monitor.closed:
            monitors.append(self._sender_monitor)
        polled = monitors if wake is None else [wake, *monitors]
        if polled != self._polled:
            self._polled, self._poller = polled, zmq.Poller()
            for sock in polled:
                self._poller.register(sock, zmq.POLLIN)
        ready = dict(self._poller.poll(timeout_ms))
        if wake is not None and wake in ready:
            wake.recv_multipart()
        told = set()
        for monitor in monitors:
            if monitor in ready:
                event, file = sockets.receive_event_and_file(monitor)
                if event == zmq.EVENT_CONNECTED and monitor is self._sender_monitor:
                    self._file = file
                if what := self._on_event(event):
                    told.add(what)
        return told

    def await_sent(self, deadline: float) -> None:
        """Wait until the closed sender has sent all, up to `deadline`; see `ConnectionWatch.wait_closed`."""
        monitor = self._sender_monitor
        while not monitor.closed and (left_s := deadline - time.monotonic()) > 0:
            if not monitor.poll(int(left_s * 1000) + 1) or sockets.receive_event(monitor) == zmq.EVENT_MONITOR_STOPPED:
                return

    def close_monitors(self) -> None:
        """Close what watches the sockets, which are closed by those that use them."""
        self._sender_monitor.close()
        self._receiver_monitor.close()

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _close_sender(self) -> None:
        """Close it; its monitor is closed after its last word, for which ZeroMQ's threads else wait for ever."""
        self.link.close(linger_s=0.0)
        self.await_sent(time.monotonic() + CLOSE_S)
        self._sender_monitor.close()

    def _begin(self) -> None:
        """No connection is made yet."""
        self._state = ConnectionState()
        self._num_up = 0
        self._file = None
        self.refusal: str | None = None

    def _on_event(self, event: int) -> Told | None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_up += 1
            if self.is_up:
                self._was_up, self.doubt = True, None
            return Told.CONNECTED
        if event == zmq.EVENT_DISCONNECTED and self._num_up:
            return Told.BROKE
        if event in (*HANDSHAKE_FAILED, zmq.EVENT_CONNECTED):
            reason = self._state.on_event(event, time.monotonic())
            if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._was_up:  # of a broker that is just dying, too
                self.doubt = reason or self.doubt
            else:
                self.refusal = self.refusal or reason
        return None

    def _drain_events(self) -> None:
        """Forget what the monitor says of the connection before."""
        with contextlib.suppress(zmq.Again):
            while True:
                sockets.receive_event(self._receiver_monitor, zmq.NOBLOCK)

    def _connect_receiver(self, address: str, end: bytes) -> None:
        self.receiver.setsockopt(zmq.ROUTING_ID, RECEIVER + self._incarnation + end)
        self.receiver.setsockopt(zmq.PROBE_ROUTER, 1)  # an empty message on this very connection: the hello
        try:
            sockets.connect(self.receiver, address, self._credentials)
            self._endpoint = self.receiver.getsockopt_string(zmq.LAST_ENDPOINT)
        finally:
            self.receiver.setsockopt(zmq.PROBE_ROUTER, 0)

    def _disconnect_receiver(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            with contextlib.suppress(zmq.ZMQError):
                self.receiver.disconnect(endpoint)
