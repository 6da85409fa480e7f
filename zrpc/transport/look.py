"""Looks whether a worker still lives, from outside of it.

Who listens at an address may be another worker by now, or another program. So a socket connects there, and tries to
reach the routing id that is the worker's life: once the connection is made, it can be reached or it is another life.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from typing import TYPE_CHECKING

import zmq

from zrpc.errors import ConfigError
from zrpc.transport import local_socket, sockets
from zrpc.transport.watch import EVENTS, HANDSHAKE_FAILED

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials

LOOK_S = 2.0
"""How long a look takes at most. A worker that stands still, or whose host is off, says nothing in that time."""
KNOWN_S = 0.2
"""How long it may take, once a connection is made, until its routing id is known."""


def has_ended(address: str, incarnation: Incarnation, own_address: str, credentials: Credentials | None) -> bool:
    """Whether the worker that listened at `address` in that life has ended for certain.

    One whose key was revoked has: it is a member no more. False as well where that cannot be found out: it does not
    answer, say, or its address means another host here.

    Args:
        address: the worker's, `tcp://host:port`.
        incarnation: which life.
        own_address: where this worker listens: what it holds itself, nobody else does.
        credentials: those of the group.
    """
    if credentials is not None and credentials.is_revoked(incarnation):
        return True
    if local_socket.is_listening(incarnation):
        return False
    try:
        host, port = sockets.split_address(address)
        if address == own_address:
            return True
        if _is_loopback(host) and not _is_loopback(sockets.split_address(own_address)[0]):
            return False
        deadline = time.monotonic() + LOOK_S
        sockets.open_connection(host, port, LOOK_S).close()
        return _is_another(address, incarnation, credentials, deadline)
    except ConnectionRefusedError:
        return True
    except (ConfigError, OSError):
        return False


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    return host == "localhost"


def _is_another(address: str, incarnation: Incarnation, credentials: Credentials | None, deadline: float) -> bool:
    """Whether what listens there is not that life for certain."""
    with sockets.make_context() as context, sockets.make_socket(context, zmq.ROUTER) as sock:
        monitor = sockets.make_monitor(context, sock, EVENTS)
        try:
            sockets.connect(sock, address, credentials, incarnation)
            while monitor.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                event = sockets.receive_event(monitor)
                if event in HANDSHAKE_FAILED or event == zmq.EVENT_DISCONNECTED:
                    return True  # no worker of this group, or one that ended just now
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return not _is_reached(sock, incarnation)
            return False
        finally:
            sock.disable_monitor()
            monitor.close()


def _is_reached(sock: sockets.Socket, incarnation: Incarnation) -> bool:
    """Whether the other end of the only connection of `sock` is that life."""
    deadline = time.monotonic() + KNOWN_S
    while True:
        try:
            sock.send_multipart([incarnation, b""], zmq.NOBLOCK)  # it only wakes the reader there
        except zmq.ZMQError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        else:
            return True
