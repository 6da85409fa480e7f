"""Whether the other host still acknowledges what is sent to it: the kernel knows.

What: a process that stands still, or is busy, sends nothing for a while, and its kernel acknowledges all the same what
it is sent, or says that it has no room. A host that is gone, or cut off, does neither. So the two are told apart by
`TCP_INFO`: the kernel here has sent something again, more than once, and had no word since.

Threads: any. Failure: where the system does not say (it is not Linux, or the connection is closed), nothing is known.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

RESENT = 2
"""So often something is sent again before the other host is taken for gone. The kernel waits twice as long each time,
from 0.2 s, or twice the time of a round trip."""
_HEAD = struct.Struct("=8B13I")
_RETRANSMITS, _PROBES = 2, 3
_LAST_ACK_MS = 20


def is_gone(file: int | None, for_s: float) -> bool:
    """Whether nothing came from the other host for so long, though it was asked.

    Args:
        file: the descriptor of a TCP connection; None, or one that is closed: it is not known.
        for_s: how long, in seconds.
    """
    if file is None or not sys.platform.startswith("linux"):
        return False
    try:
        with socket.socket(fileno=os.dup(file)) as connection:
            told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _HEAD.size)
    except OSError:
        return False
    if len(told) < _HEAD.size:
        return False
    fields: tuple[int, ...] = _HEAD.unpack(told)
    return max(fields[_RETRANSMITS], fields[_PROBES]) >= RESENT and fields[_LAST_ACK_MS] >= for_s * 1000
