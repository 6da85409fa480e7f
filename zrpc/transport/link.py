"""What messages to one worker travel on. There are three kinds.

What: a *local* link is a Unix socket (`zrpc.transport.local_links`), a *tcp* link a ZeroMQ DEALER, and a *relay* link
goes through the broker (both `zrpc.transport.socket_link`). An endpoint chooses one for each worker that it sends to,
with the first message, and keeps it: so messages keep their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.wire.envelope import Buffer

MAX_QUEUED = 1_000_000
"""Messages that may wait in a link for a worker that does not read; one more is refused."""
MAX_QUEUED_NBYTES = 1 << 30
"""The same in bytes; a single message may be larger. See `zrpc.transport.credit`."""

SEND_COPY_MAX_NBYTES = 512 << 10
"""Larger frames are sent without a copy. That costs a change of threads: pyzmq has a thread that lets go of the memory,
and it wants the interpreter's lock. Echoes over loopback TCP, without and with the copy: 330 and 250 µs of 100 KiB, 530
and 350 of 512 KiB; from 1 MiB on no difference shows, and series of large ones are a quarter slower with it."""


class Link(Protocol):
    """The sending end toward one worker. Any thread may use it."""

    @property
    def queued_nbytes(self) -> int:
        """How much waits here because the peer has not read what was sent before, in bytes."""

    @property
    def takes_files(self) -> bool:
        """Whether files can go with a message (`zrpc.transport.packets.Bundle`)."""

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send one message, or keep it until there is room. Messages keep their order. Never waits.

        Frames larger than `SEND_COPY_MAX_NBYTES` may be sent without a copy: their memory is
        held, and must stay unchanged, until it has left.

        Raises:
            PeerLostError: the link is closed, or broken.
            OverloadedError: too much is kept already.
        """

    def flush(self, timeout_s: float) -> None:
        """Take no more messages, and give those that are kept up to `timeout_s` to leave."""

    def close(self, linger_s: float) -> None:
        """Send nothing any more; what the system has taken may go on to leave, for up to `linger_s`. Idempotent."""
