"""The owner's side of reference counting: which forks of which RRefs are alive, and who holds them.

An RRef's count is the set of its fork ids, so adding or removing a fork twice is the same as once. What sets cannot
tell is late from new: a fork request that was repeated on its way may come after the delete that ended the fork. The
table therefore remembers the forks that ended and the RRefs that nobody uses any more (`Remembered`).

A value's life does not depend on the creation message coming first. Users that the owner hears of before the creation
put the RRef in AWAITED, where it has forks but no value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING

from zrpc.rref.actions import Action, Orphan, Release, Unmade
from zrpc.rref.states import OWNER_TRANSITIONS, OwnerEvent, OwnerState, step

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from zrpc.ids import ForkId, GlobalId, Incarnation, RRefId

REMEMBERED_MAX = 16384
"""So many ended forks (about 2 MB) stay known. A repeated fork request can only do harm if it is overtaken by that many
deletes on one owner; then it counts a user that is gone, until that user's worker is lost or the owner shuts down."""
FORGOTTEN_AT_ONCE = 64
"""The oldest 64th is forgotten together: in a plain dict, which takes half of what an ordered one does, to find the
oldest entry means to pass over those that were deleted before."""

UNSENT = b""
"""Holder of a fork that is pickled but not sent to anybody yet."""


class Remembered:
    """The last `limit` ids that were added, or nearly as many. Each is kept as one number."""

    __slots__ = ("_ids", "_limit")

    def __init__(self, limit: int = REMEMBERED_MAX) -> None:
        self._ids: dict[int, None] = {}
        self._limit = limit

    def __contains__(self, item: GlobalId) -> bool:
        return _number(item) in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, item: GlobalId) -> None:
        ids = self._ids
        ids[_number(item)] = None
        if len(ids) > self._limit:
            for oldest in list(islice(ids, max(1, self._limit // FORGOTTEN_AT_ONCE))):
                del ids[oldest]

    def discard(self, item: GlobalId) -> None:
        self._ids.pop(_number(item), None)


def _number(item: GlobalId) -> int:
    return (int.from_bytes(item.life, "big") << 32 | item.created_on) << 64 | item.local_id


class Availability(Enum):
    """What a user that asks for a value is to be told."""

    HERE = "answer as soon as the value is set"
    AWAITED = "its creation is on its way; answer as soon as the value is set"
    REFUSED = "the asking fork was deleted, or everybody's forks were: there is nothing to answer with"


@dataclass(slots=True)
class Owned:
    """One RRef of this owner that somebody uses.

    Attributes:
        forks: the users that keep it alive, each with the life that holds it.
        waiting: forks that want its value before it was created, each with the life that asked; they keep the record,
            never the value.
    """

    state: OwnerState
    forks: dict[ForkId, Incarnation] = field(default_factory=dict)
    waiting: dict[ForkId, Incarnation] = field(default_factory=dict)


class OwnerTable:
    """The RRefs that worker `me` owns and others use. Whoever calls it owns it: nothing here locks.

    Args:
        me: this worker's incarnation.
        lost: the lives that are over; the caller keeps it up to date.
        remembered_max: see `REMEMBERED_MAX`.
    """

    def __init__(
        self, me: Incarnation, lost: Container[Incarnation] = (), remembered_max: int = REMEMBERED_MAX
    ) -> None:
        self._me = me
        self._lost = lost
        self._owned: dict[RRefId, Owned] = {}
        self._ended = Remembered(remembered_max)
        self._unused = Remembered(remembered_max)
        self._failed = Remembered(remembered_max)

    def __len__(self) -> int:
        return len(self._owned)

    def __contains__(self, rref_id: RRefId) -> bool:
        return rref_id in self._owned

    def __iter__(self) -> Iterator[RRefId]:
        return iter(self._owned)

    def forks(self, rref_id: RRefId) -> dict[ForkId, Incarnation]:
        """The counted forks of `rref_id` and who holds them."""
        owned = self._owned.get(rref_id)
        return dict(owned.forks) if owned else {}

    def counts(self, rref_id: RRefId, fork_id: ForkId) -> bool:
        """Whether `fork_id` keeps the value of `rref_id` alive."""
        owned = self._owned.get(rref_id)
        return owned is not None and fork_id in owned.forks

    def state(self, rref_id: RRefId) -> OwnerState:
        """What is known of `rref_id`.

        Unless it is used, an RRef is UNUSED whose creation can not be on its way: it was made here, or its creator is
        lost.
        """
        owned = self._owned.get(rref_id)
        if owned:
            return owned.state
        creator = rref_id.life
        over = creator == self._me or creator in self._lost or rref_id in self._unused
        return OwnerState.UNUSED if over else OwnerState.UNKNOWN

    def created(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation, alive: bool = True) -> list[Action]:
        """The creation of `rref_id` came; its creator's own fork is `fork_id`, unless that ended already."""
        self._failed.discard(rref_id)
        owned = self._enter(rref_id, OwnerEvent.CREATED)
        owned.waiting.clear()
        if alive and fork_id not in self._ended:
            owned.forks[fork_id] = holder
        return self._settle(rref_id)

    def failed(self, rref_id: RRefId) -> list[Action]:
        """The creator has given up. Its call may still come: then all is as if it had not."""
        if self.state(rref_id) not in (OwnerState.UNKNOWN, OwnerState.AWAITED):
            return []
        self._failed.add(rref_id)
        owned = self._owned.get(rref_id)
        if owned is None:
            return []
        owned.waiting.clear()
        return [Unmade(rref_id), *(self._settle(rref_id) if not owned.forks else ())]

    def shared(self, rref_id: RRefId, fork_id: ForkId) -> None:
        """This worker pickled its own RRef: `fork_id` counts from now on."""
        self._enter(rref_id, OwnerEvent.SHARED).forks[fork_id] = UNSENT

    def sent(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation) -> None:
        """The fork that `shared` counted is on its way to `holder`."""
        owned = self._owned.get(rref_id)
        if owned and fork_id in owned.forks:
            owned.forks[fork_id] = holder

    def forked(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation) -> None:
        """The new user `fork_id` asks to be counted: again, too late, or before the creation, as it may be."""
        if fork_id in self._ended:
            return
        state = step(OWNER_TRANSITIONS, rref_id, self.state(rref_id), OwnerEvent.FORKED)
        if state is not OwnerState.UNUSED:
            self._enter(rref_id, OwnerEvent.FORKED).forks[fork_id] = holder

    def used(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation) -> Availability:
        """Somebody wants the value, in the name of `fork_id`."""
        if fork_id in self._ended:
            return Availability.REFUSED
        state = step(OWNER_TRANSITIONS, rref_id, self.state(rref_id), OwnerEvent.USED)
        if state is OwnerState.UNUSED or (state is OwnerState.AWAITED and rref_id in self._failed):
            return Availability.REFUSED
        if state is OwnerState.AWAITED:
            self._enter(rref_id, OwnerEvent.USED).waiting[fork_id] = holder
            return Availability.AWAITED
        return Availability.HERE

    def ended(self, rref_id: RRefId, fork_id: ForkId) -> list[Action]:
        """The user `fork_id` is gone, and whatever of it comes later is late."""
        self._ended.add(fork_id)
        return self.forget(rref_id, fork_id)

    def forget(self, rref_id: RRefId, fork_id: ForkId) -> list[Action]:
        """Nothing more comes from `fork_id`, in whose name this worker itself waited or was counted."""
        owned = self._owned.get(rref_id)
        if owned is None:
            return []
        owned.forks.pop(fork_id, None)
        owned.waiting.pop(fork_id, None)
        return self._settle(rref_id)

    def peer_lost(self, peer: Incarnation) -> list[Action]:
        """The life `peer` is over, and with it what it held and what it was still to create."""
        actions: list[Action] = []
        for rref_id, owned in list(self._owned.items()):
            owned.forks = {fork: holder for fork, holder in owned.forks.items() if holder != peer}
            owned.waiting = {fork: holder for fork, holder in owned.waiting.items() if holder != peer}
            if owned.state is OwnerState.AWAITED and rref_id.life == peer:
                owned.state = step(OWNER_TRANSITIONS, rref_id, owned.state, OwnerEvent.CREATOR_LOST)
                owned.waiting.clear()
                actions.append(Orphan(rref_id))
            actions += self._settle(rref_id)
        return actions

    @property
    def num_sent(self) -> int:
        """How many RRefs are waited for, or have a fork that is known to have left for somebody."""
        return sum(
            bool(owned.waiting) or any(holder != UNSENT for holder in owned.forks.values())
            for owned in self._owned.values()
        )

    def drop_unsent(self) -> list[Action]:
        """Do not count forks that are not known to have left."""
        unsent = [(r, fork) for r, owned in self._owned.items() for fork, to in owned.forks.items() if to == UNSENT]
        return [action for rref_id, fork in unsent for action in self.forget(rref_id, fork)]

    def drop_unforked(self) -> list[Action]:
        """Forget what only waits for a creation: this worker shuts down."""
        actions: list[Action] = []
        for rref_id, owned in list(self._owned.items()):
            owned.waiting.clear()
            actions += self._settle(rref_id)
        return actions

    def _enter(self, rref_id: RRefId, event: OwnerEvent) -> Owned:
        state = step(OWNER_TRANSITIONS, rref_id, self.state(rref_id), event)
        owned = self._owned.get(rref_id)
        if owned is None:
            owned = self._owned[rref_id] = Owned(state)
            self._unused.discard(rref_id)
        owned.state = state
        return owned

    def _settle(self, rref_id: RRefId) -> list[Action]:
        owned = self._owned[rref_id]
        if owned.forks or owned.waiting:
            return []
        state = step(OWNER_TRANSITIONS, rref_id, owned.state, OwnerEvent.EMPTIED)
        del self._owned[rref_id]
        if state is OwnerState.UNUSED:
            self._unused.add(rref_id)
            return [Release(rref_id)]
        return [Unmade(rref_id), Release(rref_id)]
