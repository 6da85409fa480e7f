"""Pinned memory of the host: a bounded pool of blocks that are used again.

To pin memory takes longer than to copy through it, so blocks are kept. What is handed out is a *loan*: the block comes
back by itself when nobody sees its memory any more, a frame that waits in a socket included. It may come back while a
device still copies from or to it (a call failed half-way, say). So each block knows the last event of the copies that
it was given for, and is not lent again before that.

The bound is one of what is pinned through this pool, lent or not. Where it is reached, `lend` has nothing to give, and
`borrow` gives memory from outside of the pool: nobody ever waits for a block, so nobody can wait for ever.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zrpc import finalizers, interrupts

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from zrpc.staging.accelerator import Event

log = logging.getLogger("zrpc")

BLOCK_MIN_NBYTES = 4096
"""Smaller blocks are not made: to pin means to pin pages."""


@dataclass(slots=True, eq=False)
class Block:
    """Pinned memory, or what stands in for it.

    Attributes:
        memory: uint8.
        busy_until: the last copy from or to it that a device was told to make.
    """

    memory: torch.Tensor
    busy_until: Event | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no device copies from or to it."""
        return self.busy_until is None or self.busy_until.query()


class Loan:
    """A block in somebody's hands.

    Attributes:
        block: the block.
        array: its first bytes, as many as were asked for, not copied. The block is lent for as long as anybody sees it.
        is_pooled: whether the block comes back to the pool; if not, it is gone with the loan, whatever devices do.
    """

    __slots__ = ("array", "block", "is_pooled")

    def __init__(self, block: Block, array: npt.NDArray[np.uint8], *, is_pooled: bool) -> None:
        self.block = block
        self.array = array
        self.is_pooled = is_pooled

    def in_use_until(self, event: Event) -> None:
        """A device was told to copy from or to the block, which `event` follows."""
        self.block.busy_until = event

    @property
    def tensor(self) -> torch.Tensor:
        """The same memory as a tensor, for a device to copy; it does not keep the loan."""
        return self.block.memory[: self.array.nbytes]


class PinnedPool:
    """Any thread may call it; the lock owns the tables. Blocks that come back are only put into a queue.

    Args:
        pin: makes pinned memory; raises RuntimeError where there is none.
        max_nbytes: how much the pool may pin.
    """

    def __init__(self, pin: Callable[[int], torch.Tensor], max_nbytes: int) -> None:
        self._pin = pin
        self._max_nbytes = max_nbytes
        self._lock = threading.Lock()
        self._kept: defaultdict[int, deque[Block]] = defaultdict(deque)
        self._returned: deque[Block] = deque()
        self._loans: dict[int, weakref.ref[Any]] = {}
        self._nbytes = 0
        self._kept_nbytes = 0
        self._num_lent = 0
        self._num_pinned = 0
        self._num_outside = 0

    def lend(self, nbytes: int, share: float = 1.0) -> Loan | None:
        """A block of at least `nbytes`, its content undefined; None where the pool has none to give.

        Args:
            nbytes: how much; at least 1.
            share: the part of the pool that may be lent after that.
        """
        room = room_for(nbytes)
        with self._lock:
            self._take_back()
            if self._nbytes - self._kept_nbytes + room > share * self._max_nbytes:
                return None
            block = self._find(room) or self._make(room)
            if block is None:
                return None
            self._num_lent += 1
            return self._loan(block, nbytes)

    def borrow(self, nbytes: int) -> Loan:
        """As `lend`, but where the pool has none it is memory from outside of it, pinned if there is any."""
        loan = self.lend(nbytes)
        if loan is not None:
            return loan
        with self._lock:
            self._num_outside += 1
            first = self._num_outside == 1
        if first:
            log.warning(
                "all %d bytes of pinned memory are in use, and more is taken: give pinned_pool_nbytes of the options a "
                "larger number if this worker sends much from its devices at once", self._max_nbytes,
            )  # fmt: skip
        try:
            memory = self._pin(nbytes)
        except RuntimeError:
            memory = torch.empty(nbytes, dtype=torch.uint8)
        return Loan(Block(memory), memory.numpy(), is_pooled=False)

    def counts(self) -> dict[str, int]:
        """Bytes pinned, and of these lent; how often blocks were lent, pinned anew, and taken from outside."""
        with self._lock:
            self._take_back()
            return {
                "pinned_nbytes": self._nbytes, "pinned_lent_nbytes": self._nbytes - self._kept_nbytes,
                "pinned_loans": self._num_lent, "pinned_blocks_made": self._num_pinned,
                "pinned_outside_pool": self._num_outside,
            }  # fmt: skip

    def _loan(self, block: Block, nbytes: int) -> Loan:
        array: npt.NDArray[np.uint8] = np.frombuffer(block.memory.numpy().data, np.uint8, nbytes)

        @interrupts.uninterrupted
        def give_back(reference: weakref.ref[Any]) -> None:  # it may run anywhere, under the lock too
            self._loans.pop(id(reference), None)
            self._returned.append(block)

        reference = weakref.ref(array, give_back)
        self._loans[id(reference)] = reference
        return Loan(block, array, is_pooled=True)

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._kept[block.memory.nbytes].append(block)
            self._kept_nbytes += block.memory.nbytes

    def _find(self, room: int) -> Block | None:
        """A kept block of that size that no device uses; the one that came back first is the likeliest."""
        kept = self._kept[room]
        for _ in range(len(kept)):
            block = kept.popleft()
            if block.is_idle:
                self._kept_nbytes -= room
                return block
            kept.append(block)
        return None

    def _make(self, room: int) -> Block | None:
        """A fresh block, for which idle ones of other sizes may have to go."""
        for kept in self._kept.values():
            for _ in range(len(kept)):
                if self._nbytes + room <= self._max_nbytes:
                    break
                block = kept.popleft()
                if block.is_idle:
                    self._nbytes -= block.memory.nbytes
                    self._kept_nbytes -= block.memory.nbytes
                else:
                    kept.append(block)
        if self._nbytes + room > self._max_nbytes:
            return None
        try:
            memory = self._pin(room)
        except RuntimeError as error:
            finalizers.defer(partial(log.warning, "%d bytes cannot be pinned: %s", room, error))
            return None
        self._nbytes += room
        self._num_pinned += 1
        return Block(memory)


def room_for(nbytes: int) -> int:
    """The size of the block that takes `nbytes`: a power of two, as torch pins memory in such."""
    return max(BLOCK_MIN_NBYTES, 1 << (nbytes - 1).bit_length())
