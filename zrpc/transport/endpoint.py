"""What every transport gives the floor above: frames out to a worker, frames in from one, and word of a lost one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zrpc.ids import Incarnation
from zrpc.transport.inbox import Inbox, Work
from zrpc.wire.envelope import Buffer

OnFrames = Callable[[Incarnation, list[Buffer]], Work | None]
"""`on_frames(source, frames)`: a message came. Runs on whichever thread reads; see `zrpc.transport.inbox.Take`."""

OnLost = Callable[[Incarnation, str], None]
"""`on_lost(peer, reason)`: the peer cannot be reached any more. Any thread; it must not block or raise."""


class Endpoint(Protocol):
    """One worker's end of the transport.

    Attributes:
        incarnation: this life of the worker.
        inbox: what is read.
        is_encrypted: whether connections to other hosts are.
    """

    incarnation: Incarnation
    inbox: Inbox
    is_encrypted: bool

    def start(self, on_frames: OnFrames, on_lost: OnLost) -> None:
        """Begin to read. Nothing is delivered before; nothing that came earlier is lost."""

    def interrupt(self) -> None:
        """What a thread in `inbox.wait_for` waits for has come without a message: let it look."""

    def send(self, to: Incarnation, frames: Sequence[Buffer]) -> None:
        """Send one message to the worker `to`, from any thread, without blocking. Messages to it keep their order.

        Frames larger than `zrpc.transport.link.SEND_COPY_MAX_NBYTES` may be sent without a copy: their memory is
        held, and must stay unchanged, until ZeroMQ has let go of it. A `Bundle` has files that go with it, to a worker
        of this host (`takes_files`).

        Raises:
            PeerLostError: the worker is not connected, or known to be lost.
            AgentClosedError: this endpoint is closed.
        """

    def takes_files(self, to: Incarnation) -> bool:
        """Whether files can go with a message to that worker: it is on this host. The link to it is made, if need be.

        Raises:
            PeerLostError: as `send`.
            AgentClosedError: as `send`.
        """

    def meet(self, peer: Incarnation) -> None:
        """`peer` can be sent to from now on: send what it could not be answered before."""

    def add_peer(self, peer: Incarnation, address: str) -> None:
        """`peer`, which is no member and listens at `address`, can be sent to from now on. Idempotent."""

    def remove_peer(self, peer: Incarnation, reason: str) -> bool:
        """It cannot be any more; false if that was known."""

    def why_not_observe(self, life: Incarnation) -> str | None:
        """Why an observer may not look at this worker, as far as its key says; None: it may."""

    def local_ports(self) -> set[int]:
        """The ports that it listens on."""

    def remote_addresses(self) -> set[tuple[str, int]]:
        """Where it connects to."""

    def queued_nbytes(self, to: Incarnation) -> int:
        """How much waits here because that worker has not read what was sent before, in bytes."""

    def release(self) -> None:
        """Give the system all that waits for workers that have not read what was sent before: this one shuts down."""

    def watch(self, peer: Incarnation) -> None:
        """See to it that `on_lost` tells of the loss of `peer` even if nothing is ever sent to it."""

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        """Stop reading, give what is unsent up to `flush_s` seconds to leave, and close every socket. Idempotent.

        With `at_exit` the process is about to end, maybe by an error of its own. The connections by which others notice
        that are left for the system to break when it is gone: else theirs might end first, and whoever started all of
        them would see another worker's error.
        """
