"""The slabs of one size: which one is used next, and which were not used lately."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.transport.slab import Slab

SWEEP = 16
"""So many slabs are looked at in one go for such as are free again."""


@dataclass(slots=True)
class Shelf:
    """The slabs of one size. Owned by the pool's lock."""

    placed: deque[Slab] = field(default_factory=deque)
    """Given to receivers, the last one last; some may be free again."""
    free: list[Slab] = field(default_factory=list)
    """Known to be free; the one used last is the last."""

    def take(self) -> Slab | None:
        """A free slab, the warmest there is."""
        if self.placed and self.placed[-1].memory.is_free():
            return self.placed.pop()
        if not self.free:
            self.sweep(SWEEP)
        return self.free.pop() if self.free else None

    def sweep(self, count: int) -> None:
        """Look at `count` slabs for such as are free again, a few at a time in turn."""
        for _ in range(min(count, len(self.placed))):
            slab = self.placed.popleft()
            (self.free if slab.memory.is_free() else self.placed).append(slab)

    def take_unused(self) -> list[Slab]:
        """Take out what is free and was not used since this was asked before."""
        self.sweep(len(self.placed))
        used = [(slab, slab.was_used()) for slab in self.free]
        self.free = [slab for slab, is_used in used if is_used]
        return [slab for slab, is_used in used if not is_used]

    def pick(self, holder: Incarnation) -> list[Slab]:
        """Take out what `holder` holds."""
        picked = [
            slab
            for slab in self.placed
            if (slab.holder == holder or holder in slab.shares) and not slab.memory.is_free()
        ]
        for slab in picked:
            self.placed.remove(slab)
        return picked
