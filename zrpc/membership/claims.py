"""Names and ranks that the workers of a dynamic group hold in its store.

What: a name or rank is held by whoever first wrote its incarnation and address there, until it gives it up. A worker
that dies without a goodbye gives nothing up. So a newcomer that finds a name or rank held looks whether its holder has
ended; then it takes it, and notes for all others that the holder is gone.

Invariants: each change of a claim is one `compare_set` from the value that was looked at, so that of several newcomers
one gets it, and a holder that was thought to have ended gives up nothing that is another's by now.

Failure: a holder of which it cannot be found out whether it has ended keeps what it holds.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from zrpc.errors import RefusedError
from zrpc.membership.counter import Counter

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation
    from zrpc.membership.counter import Store

    HasEnded = Callable[[str, Incarnation], bool]
    """`has_ended(address, incarnation)`: whether the worker that listened there in that life has ended for certain."""

FREE = ""
TRIES = 64
"""Each is in vain only where another has changed the claim meanwhile; what goes on changing it is no worker."""
LEFT = "it left the group"
DIED = "it died without leaving the group: nothing of it is left at its address"


class Claims:
    """What one worker holds. Whoever calls it owns it.

    Args:
        store: the store of the group.
        incarnation: this life of the worker.
        address: where it listens already.
        has_ended: looks whether another has ended.
    """

    def __init__(self, store: Store, incarnation: Incarnation, address: str, has_ended: HasEnded) -> None:
        self._store = store
        self._life = incarnation
        self._mine = f"{incarnation.hex()} {address}"
        self._has_ended = has_ended
        self._held: list[str] = []

    def take(self, key: str, *, from_ended: bool = True) -> bool:
        """Hold `key`, if it is free or its holder has ended; false: another worker holds it.

        Args:
            key: what to hold.
            from_ended: look whether the holder has ended.
        """
        expected = FREE
        for _ in range(TRIES):
            holder = self._store.compare_set(key, expected, self._mine).decode()
            if holder == self._mine:
                self._held.append(key)
                return True
            if holder == FREE:  # it was given up just now
                expected = FREE
            elif from_ended and self._is_over(holder):
                expected = holder
            else:
                break
        return False

    def release(self) -> None:
        """Give up all that is held and was not taken by another meanwhile."""
        while self._held:
            with contextlib.suppress(RefusedError):  # it was overwritten by what is no worker
                self._store.compare_set(self._held.pop(), self._mine, FREE)

    def note_index(self, index: int) -> None:
        """This worker's record lies under `index`."""
        self._store.set(f"index/{self._mine.split()[0]}", str(index))

    def note_ended(self, incarnation: Incarnation, address: str) -> bool:
        """Look whether a worker has ended; then the others are to know. False: it has not, as far as can be said."""
        return self._is_over(f"{incarnation.hex()} {address}")

    def _is_over(self, holder: str) -> bool:
        life, _, address = holder.partition(" ")
        if not self._has_ended(address, bytes.fromhex(life)):
            return False
        index_key = f"index/{life}"
        if self._store.check([index_key]):  # else it died before anybody could read of it
            note_left(self._store, int(self._store.get(index_key)), DIED, self._life)
        return True


def note_left(store: Store, index: int, reason: str, by: Incarnation) -> None:
    """Note that the worker whose record lies under `index` is not in the group any more, and that this is news.

    Args:
        store: of the group.
        index: of whom.
        reason: why.
        by: the worker that notes it.
    """
    store.set(f"left/{index}", reason)
    Counter(store, "departures").next(by)
