"""What the kernel counts of TCP connections: bytes in and out, and the time that a packet takes there and back.

What: the kernel counts anyway, so that nothing is counted here. Messages on local links (Unix sockets) and in shared
memory are not among it, and neither are the parts of what CURVE adds told from the rest.

Threads: any. Failure: a connection that cannot be looked at is left out; elsewhere than on Linux all are.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import suppress
from typing import NamedTuple

LOOK_MAX = 4096
"""So many open files are looked at, at most."""
_DESCRIPTORS = "/proc/self/fd"
_INFO = struct.Struct("=68xI48xQQ")  # tcpi_rtt, tcpi_bytes_acked, tcpi_bytes_received; see <linux/tcp.h>


class Traffic(NamedTuple):
    """One connection.

    Attributes:
        address: the other end.
        is_inbound: the other end has made it.
        sent: bytes that the other end has acknowledged.
        received: bytes that came.
        round_trip_s: as the kernel estimates it.
    """

    address: str
    is_inbound: bool
    sent: int
    received: int
    round_trip_s: float


def traffic(local_ports: set[int], remote_addresses: set[tuple[str, int]]) -> list[Traffic]:
    """The connections of this process to ports where it listens, and to addresses that it connects to."""
    if not os.path.isdir(_DESCRIPTORS):
        return []
    found = []
    for entry in os.listdir(_DESCRIPTORS)[:LOOK_MAX]:
        with suppress(OSError):
            if (one := _look(int(entry), local_ports, remote_addresses)) is not None:
                found.append(one)
    return found


def _look(descriptor: int, ports: set[int], addresses: set[tuple[str, int]]) -> Traffic | None:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return None
    borrowed = socket.socket(fileno=descriptor)
    try:
        if borrowed.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        peer, own_port = borrowed.getpeername()[:2], borrowed.getsockname()[1]
        if own_port not in ports and peer not in addresses:
            return None
        rtt_us, sent, received = _INFO.unpack(borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
        return Traffic(f"{peer[0]}:{peer[1]}", own_port in ports, sent, received, rtt_us / 1e6)
    finally:
        borrowed.detach()
