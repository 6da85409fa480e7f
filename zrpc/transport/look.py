"""Looks whether a worker still lives, from outside of it.

Who listens at an address may be another worker by now, or another program. A worker says which life it is in the first
words of ZeroMQ's protocol (ZMTP 3, https://rfc.zeromq.org/spec/23): its ROUTER's `Identity` is the incarnation. So the
two first words are exchanged, by hand, and the connection is closed again.
"""

from __future__ import annotations

import contextlib
import ipaddress
import struct
import time
from typing import TYPE_CHECKING

from zrpc.errors import ConfigError
from zrpc.transport import local_socket, sockets

if TYPE_CHECKING:
    import socket

    from zrpc.ids import Incarnation

LOOK_S = 2.0
"""How long a look takes at most. A worker that stands still, or whose host is off, says nothing in that time."""

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_GREETING = _SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
_READY = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + b"\x08Identity" + struct.pack(">I", 0)
_COMMAND = 4


def has_ended(address: str, incarnation: Incarnation, own_address: str) -> bool:
    """Whether the worker that listened at `address` in that life has ended for certain.

    False as well where that cannot be found out: it does not answer, say, or its address means another host here.

    Args:
        address: the worker's, `tcp://host:port`.
        incarnation: which life.
        own_address: where this worker listens: what it holds itself, nobody else does.
    """
    if local_socket.is_listening(incarnation):
        return False
    try:
        host, port = sockets.split_address(address)
        if address == own_address:
            return True
        if _is_loopback(host) and not _is_loopback(sockets.split_address(own_address)[0]):
            return False
        deadline = time.monotonic() + LOOK_S
        with sockets.open_connection(host, port, LOOK_S) as connection:
            return _life_at(connection, deadline) not in (None, incarnation)
    except ConnectionRefusedError:
        return True
    except (ConfigError, OSError):
        return False


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    return host == "localhost"


def _life_at(connection: socket.socket, deadline: float) -> bytes | None:
    """The `Identity` of what listens there: empty if that is none of ours. None: it said nothing, or not enough."""
    try:
        connection.sendall(_GREETING + bytes([_COMMAND, len(_READY)]) + _READY)
        greeting = _read(connection, len(_GREETING), deadline)
        if greeting[:1] != _SIGNATURE[:1] or greeting[9:10] != _SIGNATURE[9:10]:
            return b""
        flags, length = _read(connection, 2, deadline)
        return _identity(_read(connection, length, deadline)) if flags == _COMMAND else b""
    except TimeoutError:
        return None
    except ConnectionError:  # it ended just now, or is another program: a worker takes everybody in
        return b""


def _read(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    read = b""
    while len(read) < nbytes:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        more = connection.recv(nbytes - len(read))
        if not more:
            raise ConnectionError("the other side has closed the connection")
        read += more
    return read


def _identity(ready: bytes) -> bytes:
    """The property of that name in a READY command; empty if there is none."""
    if not ready.startswith(b"\x05READY"):
        return b""
    place = 6
    while place < len(ready):
        name_end = place + 1 + ready[place]
        name, value_at = ready[place + 1 : name_end], name_end + 4
        length = int.from_bytes(ready[name_end:value_at], "big")
        if name.lower() == b"identity":
            return ready[value_at : value_at + length]
        place = value_at + length
    return b""
