"""Finding the broker that a worker should go to, of those that it knows.

What: the one that has workers of its group already; else the first that answers, in the order given. So all workers of
a group meet at one, though some look later than others, when one that was dead is there again.

Threads: whichever calls; it waits for up to `CONNECT_S` for each broker, and for `ANSWER_S` for all.

Failure: a broker that does not answer in time is passed by. Workers that cannot reach the same brokers end up at
different ones, and are lost for each other.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import zmq

from zrpc.errors import ProtocolError
from zrpc.transport import sockets
from zrpc.transport.identities import ASKER, END_NBYTES
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.rejoining import Locate, Located

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials

CONNECT_S = 0.5
ANSWER_S = 2.0
_LOOK_MS = 100


def is_listening(address: str) -> bool:
    """Whether something takes connections there."""
    host, port = sockets.split_address(address)
    try:
        sockets.open_connection(host, port, CONNECT_S).close()
    except OSError:
        return False
    return True


class Finder:
    """Looks for a broker.

    Args:
        context: makes the sockets for it.
        addresses: the brokers.
        incarnation: who looks.
        credentials: what it proves itself with.
        is_over: whether to stop.
    """

    def __init__(
        self, context: sockets.Context, addresses: Sequence[str], incarnation: Incarnation,
        credentials: Credentials | None, is_over: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._context = context
        self._addresses = list(addresses)
        self._incarnation = incarnation
        self._credentials = credentials
        self._is_over = is_over

    def find(self, group: str, last: str | None) -> str | None:
        """The broker to go to; None: there is none now.

        Args:
            group: the group that is looked for.
            last: the one that this worker was connected to, which comes last; None: it was to none.
        """
        first = 0 if last is None else self._addresses.index(last) + 1
        candidates = [one for one in (*self._addresses[first:], *self._addresses[:first]) if is_listening(one)]
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        counts = self._count(candidates, group)
        return max(candidates, key=lambda one: min(counts.get(one, -1), 1)) if counts else None

    def _count(self, addresses: Sequence[str], group: str) -> dict[str, int]:
        """How many workers of the group are at those that answer."""
        made: list[sockets.Socket] = []
        poller = zmq.Poller()
        waiting: dict[sockets.Socket, str] = {}
        counts: dict[str, int] = {}
        try:
            for address in addresses:
                identity = ASKER + self._incarnation + os.urandom(END_NBYTES)
                sock = sockets.make_socket(self._context, zmq.DEALER, identity)
                made.append(sock)
                sockets.connect(sock, address, self._credentials)
                sock.send_multipart(encode(Envelope(Locate(group), 0)))
                poller.register(sock, zmq.POLLIN)
                waiting[sock] = address
            deadline = time.monotonic() + ANSWER_S
            while waiting and not self._is_over() and time.monotonic() < deadline:
                for sock, _ in poller.poll(_LOOK_MS):
                    poller.unregister(sock)
                    address = waiting.pop(sock)
                    with contextlib.suppress(ProtocolError):
                        answer = decode(list(sock.recv_multipart()[1:])).message
                        if isinstance(answer, Located):
                            counts[address] = answer.count
            return counts
        finally:
            for sock in made:
                sock.close(linger=0)
