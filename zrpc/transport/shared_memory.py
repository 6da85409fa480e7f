"""Shared memory for one worker: slabs to send in, and slabs of others.

`zrpc.transport.slabs` says how it works.
"""

from __future__ import annotations

import logging
import reprlib
from typing import TYPE_CHECKING, Any

import msgpack

from zrpc.errors import ProtocolError
from zrpc.transport.allowance import POOL_MAX_COUNT, POOL_MAX_NBYTES, limits
from zrpc.transport.attachments import Attachments
from zrpc.transport.slab import DESCRIPTOR_LENGTH, HANDED_BACK, NOBODY, SLOT, Descriptor
from zrpc.transport.slabs import SlabPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.filling import Fill, Unfilled
    from zrpc.transport.packets import OwnedFile
    from zrpc.transport.slab import Pins
    from zrpc.wire.envelope import Arriving, Buffer
    from zrpc.wire.region import Region

log = logging.getLogger("zrpc")


_REFUSAL = b"\xc1\x04"


def refusal(descriptor: Descriptor) -> bytes:
    """A frame that says: the slab that `descriptor` tells of could not be opened here."""
    packed: bytes = msgpack.packb(descriptor)
    return _REFUSAL + packed


def is_refusal(frames: Sequence[Buffer]) -> bool:
    """Whether a message is such a frame."""
    return len(frames) == 1 and frames[0][: len(_REFUSAL)] == _REFUSAL


class SharedMemory:
    """All of it, for one worker: slabs to send in, and slabs of others.

    Args:
        max_nbytes: what the slabs to send in may take together.
        max_count: how many of them there may be.
    """

    def __init__(self, max_nbytes: int = POOL_MAX_NBYTES, max_count: int = POOL_MAX_COUNT) -> None:
        self._pool = SlabPool(max_nbytes, max_count)
        self._attachments = Attachments()

    @classmethod
    def make(cls) -> SharedMemory:
        """Shared memory for one worker; where it cannot be found out how much it may take, to receive alone."""
        try:
            return cls(*limits())
        except OSError as error:
            log.warning("nothing is sent in shared memory, sockets are used: %s", error)
        memory = cls()
        memory._pool.close()
        return memory

    def place(
        self, peer: Incarnation, buffer: Buffer | Arriving | Region, later: list[Fill], files: list[OwnedFile]
    ) -> Descriptor | None:
        """See `SlabPool.place`."""
        return self._pool.place(peer, buffer, later, files)

    def share(self, peers: Sequence[Incarnation], buffer: Buffer | Region) -> dict[Incarnation, Descriptor] | None:
        """`SlabPool.share`; None where there are less than two of `peers`."""
        return self._pool.share(peers, buffer) if len(peers) > 1 else None

    def attach(self, peer: Incarnation, descriptor: Descriptor, files: list[OwnedFile]) -> None:
        """See `SlabPool.attach`."""
        self._pool.attach(peer, descriptor, files)

    def fill(self, later: Sequence[Fill]) -> None:
        """See `SlabPool.fill`."""
        self._pool.fill(later)

    def take_back(self, descriptor: Descriptor) -> None:
        """See `SlabPool.take_back`."""
        self._pool.take_back(descriptor)

    def give_up(self, descriptor: Descriptor) -> None:
        """See `SlabPool.give_up`."""
        self._pool.give_up(descriptor)

    def hand_back(self, peer: Incarnation, buffers: list[Any], handed: list[Descriptor]) -> None:
        """See `Attachments.hand_back`."""
        self._attachments.hand_back(peer, buffers, handed)

    def take_handed_back(self, peer: Incarnation, descriptor: Descriptor) -> None:
        """See `Attachments.take_back`."""
        self._attachments.take_back(peer, descriptor)

    def fetch(
        self, source: Incarnation, descriptor: Descriptor, unfilled: Unfilled, files: Sequence[OwnedFile | None] = ()
    ) -> memoryview:
        """The memory that `descriptor` of the worker `source` tells of; free again once nobody sees it any more.

        `unfilled` gets the slab if it is not whole yet. `files` came with the message; None: one could not be opened.

        Raises:
            ProtocolError: the slab is not there, or it is smaller, or `source` has handed back what it does not hold.
            LimitError: this process may not open its file, or not map it: tell `source`, by a `refusal`.
        """
        if len(descriptor) == DESCRIPTOR_LENGTH and descriptor[SLOT] == HANDED_BACK:
            return self._attachments.lend(self._pool.take_home(source, descriptor), NOBODY, descriptor, unfilled)
        return self._attachments.fetch(source, descriptor, unfilled, files)

    def take_refusal(self, source: Incarnation, frame: Buffer) -> None:
        """`source` could not open a slab that it was told of: the slab is free.

        Raises:
            ProtocolError: it is not with `source`.
        """
        try:
            descriptor = msgpack.unpackb(frame[len(_REFUSAL) :])
        except Exception as error:
            raise ProtocolError(f"a refusal of a slab cannot be read: {error}") from error
        if not isinstance(descriptor, list) or [type(part) for part in descriptor] != [int] * DESCRIPTOR_LENGTH:
            raise ProtocolError(f"a refusal of {reprlib.repr(descriptor)} describes no slab")
        self._pool.refuse(source, descriptor)

    def pin(self, buffer: Buffer, pins: Pins) -> None:
        """See `Attachments.pin`."""
        self._attachments.pin(buffer, pins)

    def forget(self, peer: Incarnation) -> None:
        """`peer` is gone."""
        self._pool.reclaim(peer)
        self._attachments.forget(peer)

    def trim(self) -> None:
        """Let go of slabs that were not used since this was called before, and of those that others have let go of."""
        self._pool.trim()
        self._attachments.trim()

    def counts(self) -> dict[str, int]:
        """See `SlabPool.counts`."""
        return self._pool.counts()

    def counts_of_others(self) -> dict[str, int]:
        """See `Attachments.counts`: slabs of others that are mapped here."""
        return self._attachments.counts()

    def close(self) -> None:
        """Let go of everything; memory of others that is in use stays until it is not."""
        self._pool.close()
        self._attachments.close()
