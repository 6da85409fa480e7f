"""Whether the other end of a TCP connection still acknowledges: the kernel's own account, judged.

What: the kernel of a process that stands still acknowledges what is sent, also where its buffers are full (it answers
the probes of a closed window). The kernel of a host that is off, or behind a network that is cut, does not. With
keepalive probes every second an idle connection is acknowledged as often. So what tells the two apart is for how long
nothing was acknowledged that should have been.

A time limit of the kernel's own (TCP_USER_TIMEOUT) does not tell them apart: it also ends connections whose receiver
acknowledges, and does not read.

Failure: where the system has no such account (it is not Linux), nothing is ever found silent here.
"""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import suppress
from typing import NamedTuple

IS_KNOWN = sys.platform.startswith("linux")
"""Whether the system tells."""
KEEPALIVE_S = 1
"""How often an idle connection is probed, and one that gives no answer is probed again."""
PROBED_S = 3.0 * KEEPALIVE_S
"""In less than that an idle connection may not have been probed."""
UNANSWERED_MIN = 2
"""So many sendings in a row that were not acknowledged are needed: a single one may have left just now."""
_INFO = struct.Struct("=xx2B20xI28xI84xI")  # up to tcpi_notsent_bytes; see <linux/tcp.h>


class Account(NamedTuple):
    """What the kernel says of a connection.

    Attributes:
        retransmits: how often what was not acknowledged was sent again.
        probes: how many probes were not answered.
        unacknowledged: packets that are on their way.
        acknowledged_ms: how long ago something was acknowledged.
        unsent_nbytes: what waits to be sent, as the receiver has no room.
    """

    retransmits: int
    probes: int
    unacknowledged: int
    acknowledged_ms: int
    unsent_nbytes: int

    def is_silent(self, limit_s: float) -> bool:
        """Whether the other end has acknowledged nothing for `limit_s` seconds that it should have."""
        if self.acknowledged_ms < limit_s * 1000:
            return False
        is_idle = not self.unacknowledged and not self.unsent_nbytes  # probes that cannot even leave are not counted
        return is_idle or self.retransmits >= UNANSWERED_MIN or self.probes >= UNANSWERED_MIN


def is_gone(descriptor: int | None, for_s: float) -> bool:
    """Whether the other host has acknowledged nothing for so long that it should have.

    Args:
        descriptor: of a TCP connection; None, or of anything else: it is not known, which is false.
        for_s: how long, in seconds; `PROBED_S` at least.
    """
    account = None if descriptor is None else account_of(descriptor)
    return account is not None and account.is_silent(max(for_s, PROBED_S))


def account_of(descriptor: int, port: int | None = None) -> Account | None:
    """What the kernel says of the TCP connection of `descriptor`; None: it is none, not any more, or not to `port`.

    Args:
        descriptor: a socket of ZeroMQ's, which may have closed it by now.
        port: of the other end; None: any.
    """
    if not IS_KNOWN:
        return None
    with suppress(OSError):
        borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
        try:
            if borrowed.getpeername()[1] == port or port is None:
                return Account(*_INFO.unpack(borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)))
        finally:
            borrowed.detach()
    return None
