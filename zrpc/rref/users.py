"""A user's side of reference counting: its forks of other workers' RRefs, and the children it handed out.

Two rules keep the owner's value alive for as long as anybody can ask for it:

- a fork is deleted only after the owner answered for it, so no delete overtakes what made the owner count the fork;
- a fork is deleted only after all of its children were accepted, so at any time at least one ancestor of a fork that
  the owner does not know yet is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from zrpc.rref.actions import Action, AskOwner, Tell
from zrpc.rref.owners import UNSENT
from zrpc.rref.states import USER_TRANSITIONS, UserEvent, UserState, step
from zrpc.wire.messages import RRefChildAccept, RRefCreationFailed, RRefForkRequest, RRefUserDelete

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.ids import ForkId, Incarnation, RRefId

_UNCONFIRMED = frozenset({UserState.CREATING, UserState.FORKING, UserState.LEAVING_UNCONFIRMED})
_LEAVING = frozenset({UserState.LEAVING_UNCONFIRMED, UserState.LEAVING})


@dataclass(slots=True)
class Fork:
    """One fork that this worker holds.

    Attributes:
        owner: the owner's life.
        parent: the user that handed it out and waits to hear that the owner counts it; None if nobody waits.
        children: forks of this one that were handed out and not accepted yet, each with the life it went to.
        is_creation: remote() made it.
    """

    rref_id: RRefId
    fork_id: ForkId
    owner: Incarnation
    state: UserState
    parent: Incarnation | None = None
    children: dict[ForkId, Incarnation] = field(default_factory=dict)
    is_creation: bool = False

    def __str__(self) -> str:
        return f"fork {self.fork_id} of {self.rref_id}"


class UserTable:
    """The forks that one worker holds. Whoever calls it owns it: nothing here locks."""

    def __init__(self) -> None:
        self._forks: dict[ForkId, Fork] = {}
        self._parent_of: dict[ForkId, ForkId] = {}
        self._num_unconfirmed = 0

    def __len__(self) -> int:
        return len(self._forks)

    def __iter__(self) -> Iterator[ForkId]:
        return iter(self._forks)

    def by_owner(self, at_most: int) -> Counter[Incarnation]:
        """How many forks there are by the life of the owner; so many are looked at."""
        return Counter(fork.owner for fork in islice(self._forks.values(), at_most))

    @property
    def num_unconfirmed(self) -> int:
        """How many forks wait for their owner's answer."""
        return self._num_unconfirmed

    @property
    def num_children(self) -> int:
        """How many children are not accepted yet."""
        return len(self._parent_of)

    @property
    def num_sent_children(self) -> int:
        """How many of them are known to have left for somebody."""
        return sum(holder != UNSENT for fork in self._forks.values() for holder in fork.children.values())

    def state(self, fork_id: ForkId) -> UserState:
        """The state of `fork_id`; GONE if it is not here."""
        fork = self._forks.get(fork_id)
        return fork.state if fork else UserState.GONE

    def is_child(self, fork_id: ForkId) -> bool:
        """Whether `fork_id` was handed out here, and is not accepted yet."""
        return fork_id in self._parent_of

    def create(self, rref_id: RRefId, fork_id: ForkId, owner: Incarnation) -> None:
        """remote() is about to ask `owner` for a new RRef."""
        fork = self._fork(rref_id, fork_id, owner)
        fork.is_creation = True
        self._step(fork, UserEvent.CREATED)

    def receive(
        self, rref_id: RRefId, fork_id: ForkId, owner: Incarnation, parent: Incarnation, owner_lost: bool = False
    ) -> list[Action]:
        """A fork came from `parent`, the owner (which counted it before it sent it) or another user."""
        fork = self._fork(rref_id, fork_id, owner)
        if parent == owner:
            self._step(fork, UserEvent.CAME_FROM_OWNER)
        else:
            self._step(fork, UserEvent.CAME_FROM_USER)
            fork.parent = parent
        if owner_lost:
            return self._orphan(fork)
        return [] if parent == owner else [AskOwner(owner, RRefForkRequest(rref_id, fork_id))]

    def share(self, fork_id: ForkId, child: ForkId) -> None:
        """`fork_id` is pickled for somebody as `child`: it stays until `child` is accepted.

        Raises:
            ProtocolError: `fork_id` cannot be shared any more.
        """
        fork = self._fork(fork_id, fork_id, UNSENT)
        self._step(fork, UserEvent.SHARED)
        fork.children[child] = UNSENT
        self._parent_of[child] = fork_id

    def sent(self, child: ForkId, holder: Incarnation) -> None:
        """The pickled `child` is on its way to `holder`."""
        parent = self._forks.get(self._parent_of.get(child, child))
        if parent and child in parent.children:
            parent.children[child] = holder

    def drop_unsent(self) -> list[Action]:
        """Do not wait for children that are not known to have left."""
        unsent = [child for fork in self._forks.values() for child, to in fork.children.items() if to == UNSENT]
        return [action for child in unsent for action in self.child_accepted(child)]

    def acknowledged(self, fork_id: ForkId) -> list[Action]:
        """The owner counts `fork_id`. Nothing happens if it was forgotten with a lost owner."""
        return self._answered(fork_id, UserEvent.ACKNOWLEDGED)

    def failed(self, fork_id: ForkId) -> list[Action]:
        """Asking the owner for `fork_id` failed: it may have been heard or not."""
        fork = self._forks.get(fork_id)
        told: list[Action] = []
        if fork is not None and fork.is_creation and fork.state in _UNCONFIRMED:
            told = [Tell(fork.owner, RRefCreationFailed(fork.rref_id))]
        return told + self._answered(fork_id, UserEvent.FAILED)

    def child_accepted(self, child: ForkId) -> list[Action]:
        """`child` is counted by the owner, or will never be. A repetition changes nothing."""
        parent = self._forks.get(self._parent_of.pop(child, child))
        if parent is None or parent.children.pop(child, None) is None:
            return []
        return self._settle(parent)

    def dropped(self, fork_id: ForkId) -> list[Action]:
        """The program let go of `fork_id`. A repetition changes nothing."""
        fork = self._forks.get(fork_id)
        if fork is None or fork.state in _LEAVING:
            return []
        self._step(fork, UserEvent.DROPPED)
        return self._settle(fork)

    def peer_lost(self, peer: Incarnation) -> list[Action]:
        """The life `peer` is over: forks of its RRefs are orphans, and children it held are nobody's concern."""
        actions: list[Action] = []
        for fork in list(self._forks.values()):
            if fork.parent == peer:
                fork.parent = None
            if fork.owner == peer:
                actions += self._orphan(fork)
                continue
            for child in [child for child, holder in fork.children.items() if holder == peer]:
                actions += self.child_accepted(child)
        return actions

    def _orphan(self, fork: Fork) -> list[Action]:
        for child in fork.children:
            self._parent_of.pop(child, None)
        fork.children.clear()
        self._step(fork, UserEvent.OWNER_LOST)
        return self._accept(fork)

    def _answered(self, fork_id: ForkId, event: UserEvent) -> list[Action]:
        fork = self._forks.get(fork_id)
        if fork is None:
            return []
        self._step(fork, event)
        return self._accept(fork) + self._settle(fork)

    def _accept(self, fork: Fork) -> list[Action]:
        parent, fork.parent = fork.parent, None
        return [] if parent is None else [Tell(parent, RRefChildAccept(fork.fork_id))]

    def _settle(self, fork: Fork) -> list[Action]:
        if fork.state is not UserState.LEAVING or fork.children:
            return []
        self._step(fork, UserEvent.SETTLED)
        return [Tell(fork.owner, RRefUserDelete(fork.rref_id, fork.fork_id))]

    def _fork(self, rref_id: RRefId, fork_id: ForkId, owner: Incarnation) -> Fork:
        return self._forks.get(fork_id) or Fork(rref_id, fork_id, owner, UserState.GONE)

    def _step(self, fork: Fork, event: UserEvent) -> None:
        before = fork.state
        fork.state = step(USER_TRANSITIONS, fork, before, event)
        self._num_unconfirmed += (fork.state in _UNCONFIRMED) - (before in _UNCONFIRMED)
        if fork.state is UserState.GONE:
            del self._forks[fork.fork_id]
        elif before is UserState.GONE:
            self._forks[fork.fork_id] = fork
