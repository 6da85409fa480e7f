"""Shared memory for one worker: slabs to send in, slabs of others, and with whom memory can be shared.

`zrpc.transport.slabs` says how it works.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.transport.attachments import Attachments
from zrpc.transport.probe import Probe
from zrpc.transport.slab import DESCRIPTOR_LENGTH, NOBODY, Descriptor
from zrpc.transport.slabs import SlabPool, limits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.filling import Fill, Unfilled
    from zrpc.transport.slab import Pins
    from zrpc.wire.envelope import Arriving, Buffer
    from zrpc.wire.region import Region

log = logging.getLogger("zrpc")


class SharedMemory:
    """All of it, for one worker: slabs to send in, slabs of others, and with whom memory can be shared.

    Raises:
        OSError: no memory file can be made here.
    """

    def __init__(self) -> None:
        self._probe = Probe()
        self._pool = SlabPool(*limits())
        self._attachments = Attachments()
        self._nonces: dict[Incarnation, bytes | None] = {}

    @classmethod
    def make(cls) -> SharedMemory | None:
        """Shared memory for one worker; None, with a warning, where no memory file can be made."""
        try:
            return cls()
        except OSError as error:
            log.warning("shared memory is not used, sockets are: %s", error)
            return None

    def card(self) -> list[Any]:
        """What to tell the others in the membership card."""
        return self._probe.card()

    def meet(self, peer: Incarnation, card: Any) -> None:
        """Tell `peer`, whose card said `card` of its memory, that it can be opened here, if it can."""
        self._nonces[peer] = self._probe.visit(card)

    def placing(
        self, peer: Incarnation
    ) -> Callable[[Buffer | Arriving | Region, list[Fill]], Descriptor | None] | None:
        """`SlabPool.place` for that peer; None where it cannot open, or has not yet tried to open, what is here."""
        nonce = self._nonces.get(peer)
        return partial(self._pool.place, peer) if nonce and self._probe.was_visited_by(nonce) else None

    def share(self, peers: Sequence[Incarnation], buffer: Buffer | Region) -> dict[Incarnation, Descriptor] | None:
        """`SlabPool.share` for those of `peers` that can open what is here; None where there are less than two."""
        able = [peer for peer in peers if self.placing(peer) is not None]
        return self._pool.share(able, buffer) if len(able) > 1 else None

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

    def fetch(self, source: Incarnation, descriptor: Descriptor, unfilled: Unfilled) -> memoryview:
        """The memory that `descriptor` of the worker `source` tells of; free again once nobody sees it any more.

        `unfilled` gets the slab if it is not whole yet.

        Raises:
            ProtocolError: the slab is not there, or it is smaller, or `source` has handed back what it does not hold.
        """
        own = self._pool.take_home(source, descriptor) if len(descriptor) == DESCRIPTOR_LENGTH else None
        if own is not None:
            return self._attachments.lend(own, NOBODY, descriptor, unfilled)
        return self._attachments.fetch(source, descriptor, unfilled)

    def pin(self, buffer: Buffer, pins: Pins) -> None:
        """See `Attachments.pin`."""
        self._attachments.pin(buffer, pins)

    def forget(self, peer: Incarnation) -> None:
        """`peer` is gone."""
        self._nonces.pop(peer, None)
        self._pool.reclaim(peer)
        self._attachments.forget(peer)

    def counts(self) -> dict[str, int]:
        """See `SlabPool.counts`."""
        return self._pool.counts()

    def close(self) -> None:
        """Let go of everything; memory of others that is in use stays until it is not."""
        self._pool.close()
        self._attachments.close()
        self._probe.close()
