"""One worker's part in counting references, as owner and as user: events in, actions out.

The table knows no thread, clock or socket. It relies on three things of whoever feeds it:

- an action is carried out after the lock that guards the table is released, and exactly once;
- `Tell` and `AskOwner` are repeated until they are acknowledged; they may arrive repeated, late and in any order;
- workers are told apart by their incarnations. A life that was reported lost stays lost: what still comes from it is
  ignored here. A worker that comes again under its rank is another one.

docs/rref.md tells the protocol, and what lost, late and repeated messages and dead workers do to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.errors import RRefError
from zrpc.ids import EndedLives
from zrpc.rref.actions import Action, Tell
from zrpc.rref.answered import AnsweredForks
from zrpc.rref.owners import REMEMBERED_MAX, Availability, OwnerTable, Remembered
from zrpc.rref.states import UserState
from zrpc.rref.users import UserTable
from zrpc.wire.messages import RRefChildAccept, RRefForkRequest, RRefUserDelete

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from zrpc.ids import ForkId, Incarnation, RRefId
    from zrpc.rref.forkdata import ForkData
    from zrpc.rref.states import OwnerState


class RRefTable:
    """Reference counts of worker `me`. Whoever calls it guards it with one lock: nothing here locks.

    Args:
        me: this worker's incarnation.
        remembered_max: how many ended forks and unused RRefs stay known (see `owners.REMEMBERED_MAX`).
    """

    def __init__(self, me: Incarnation, remembered_max: int = REMEMBERED_MAX) -> None:
        self._me = me
        self._lost = EndedLives()
        self._owners = OwnerTable(me, self._lost, remembered_max)
        self._users = UserTable()
        self._answers = AnsweredForks(self._is_given)
        self._revoked_forks = Remembered(remembered_max)

    # ---- this worker as owner ----------------------------------------------------------------------------------

    def begin_here(self, rref_id: RRefId) -> None:
        """remote() to this worker itself: the RRef exists until `finish_here` at least."""
        self._owners.created(rref_id, rref_id, self._me)

    def finish_here(self, rref_id: RRefId) -> list[Action]:
        """The call that `begin_here` announced is over."""
        return self._owners.forget(rref_id, rref_id)

    def creation_arrived(self, rref_id: RRefId, fork_id: ForkId, creator: Incarnation) -> list[Action]:
        """Another worker's remote() came: its value is being made.

        The RRef may be released at once, if its creator gave up and said so before, or is lost.
        """
        return self._owners.created(rref_id, fork_id, creator, alive=creator not in self._lost)

    def fork_requested(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation) -> list[Action]:
        """`RRefForkRequest` came: first, again, before the creation or after the delete."""
        if holder not in self._lost:
            self._owners.forked(rref_id, fork_id, holder)
        return []

    def creation_failed(self, rref_id: RRefId) -> list[Action]:
        """`RRefCreationFailed` came: first, again, or after the creation."""
        return self._owners.failed(rref_id)

    def user_deleted(self, rref_id: RRefId, fork_id: ForkId) -> list[Action]:
        """`RRefUserDelete` came: first, again, or before the creation."""
        return self._owners.ended(rref_id, fork_id)

    def value_wanted(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation) -> Availability:
        """A user asks for the value: by `RRefFetch`, say."""
        return Availability.REFUSED if holder in self._lost else self._owners.used(rref_id, fork_id, holder)

    def share_owned(self, rref_id: RRefId, fork_id: ForkId) -> None:
        """This worker pickles its own RRef for somebody: `fork_id` counts from now on."""
        self._owners.shared(rref_id, fork_id)

    def came_home(self, rref_id: RRefId, fork_id: ForkId, parent: Incarnation) -> tuple[Availability, list[Action]]:
        """This worker's own RRef came back to it as `fork_id`, sent by itself or by a user.

        Returns:
            Whether the value is here, will be or is gone. If it is AWAITED, `home_dropped` must follow when the program
            lets go of it. And the actions.
        """
        if parent == self._me:
            availability = self._owners.used(rref_id, fork_id, self._me)
            return availability, self._owners.forget(rref_id, fork_id)
        return self._owners.used(rref_id, fork_id, self._me), [Tell(parent, RRefChildAccept(fork_id))]

    def answering(self, holder: Incarnation, call_id: int, forks: Sequence[ForkData]) -> list[Action]:
        """This worker answers call `call_id` of `holder` with `forks`."""
        self._answers.note(holder, call_id, forks)
        return []

    def unanswered(self, giver: Incarnation, call_id: int, forks: Sequence[ForkData]) -> list[Action]:
        """Call `call_id` of `giver`, which carried `forks`, has no answer there, and is not here (any more).

        Forks that did not come are taken for ones that came and are gone: if they come after all, they are of no use.
        Those of an answer were not read, and will not be.
        """
        actions: list[Action] = []
        for fork in forks:
            if fork.parent == giver:
                actions += self._revoked(fork)
        for fork in self._answers.take(giver, call_id):
            actions += self.unsent(fork.rref_id, fork.fork_id)
        return actions

    def _revoked(self, fork: ForkData) -> list[Action]:
        if fork.parent == fork.owner_life == self._me:  # a call to this worker itself
            return self._owners.forget(fork.rref_id, fork.fork_id)
        if self._users.state(fork.fork_id) is not UserState.GONE:
            return []
        self._revoked_forks.add(fork.fork_id)
        if fork.parent != fork.owner_life:
            return [Tell(fork.parent, RRefChildAccept(fork.fork_id))]
        return [Tell(fork.owner_life, RRefUserDelete(fork.rref_id, fork.fork_id))]

    def home_dropped(self, rref_id: RRefId, fork_id: ForkId) -> list[Action]:
        """The program let go of what `came_home`."""
        return self._owners.forget(rref_id, fork_id)

    # ---- this worker as user -----------------------------------------------------------------------------------

    def create(self, rref_id: RRefId, fork_id: ForkId, owner: Incarnation) -> None:
        """remote() is about to ask `owner`; `acknowledged` or `failed` follows."""
        self._users.create(rref_id, fork_id, owner)

    def receive(
        self, rref_id: RRefId, fork_id: ForkId, owner: Incarnation, parent: Incarnation, announced: bool = True
    ) -> list[Action]:
        """A fork of another worker's RRef came, sent by `parent`.

        `announced` false: when it was pickled it was not known for whom, so an owner counts it for nobody in particular
        and is now told for whom.

        Raises:
            RRefError: whoever sent it has said before that it did not come.
        """
        if fork_id in self._revoked_forks:
            raise RRefError(f"{rref_id} came too late: the call that it came with has ended at its caller")
        actions = self._users.receive(rref_id, fork_id, owner, parent, owner in self._lost)
        if parent == owner and not announced and owner not in self._lost:
            actions.append(Tell(owner, RRefForkRequest(rref_id, fork_id)))
        return actions

    def acknowledged(self, fork_id: ForkId) -> list[Action]:
        """The owner answered remote() or `RRefForkRequest`."""
        return self._users.acknowledged(fork_id)

    def failed(self, fork_id: ForkId) -> list[Action]:
        """remote() or `RRefForkRequest` failed; it is not known whether the owner heard it."""
        return self._users.failed(fork_id)

    def share_used(self, fork_id: ForkId, child: ForkId) -> None:
        """This worker pickles its fork for somebody, as `child`."""
        self._users.share(fork_id, child)

    def child_accepted(self, child: ForkId) -> list[Action]:
        """`RRefChildAccept` came: first or again."""
        return self._users.child_accepted(child)

    def user_dropped(self, fork_id: ForkId) -> list[Action]:
        """The program let go of its fork."""
        return self._users.dropped(fork_id)

    # ---- both --------------------------------------------------------------------------------------------------

    def sent(self, rref_id: RRefId, fork_id: ForkId, holder: Incarnation) -> list[Action]:
        """What was pickled as `fork_id` is on its way to `holder`, who may be lost by now."""
        self._owners.sent(rref_id, fork_id, holder)
        self._users.sent(fork_id, holder)
        return self.unsent(rref_id, fork_id) if holder in self._lost else []

    def unsent(self, rref_id: RRefId, fork_id: ForkId) -> list[Action]:
        """What was pickled as `fork_id` will not be sent to anybody."""
        return self._owners.forget(rref_id, fork_id) + self._users.child_accepted(fork_id)

    def peer_lost(self, peer: Incarnation) -> list[Action]:
        """The life `peer` is over: it died, left or became unreachable."""
        self._lost.note(peer, "")
        return self._owners.peer_lost(peer) + self._users.peer_lost(peer)

    def drop_all_users(self) -> list[Action]:
        """Let go of every fork as if the program had: this worker shuts down."""
        return [action for fork_id in list(self._users) for action in self._users.dropped(fork_id)]

    def drop_unforked_owners(self) -> list[Action]:
        """Forget the RRefs that are only waited for: this worker shuts down."""
        return self._owners.drop_unforked()

    def drop_unsent(self) -> list[Action]:
        """Forget what was pickled and is not known to have left: nobody pickles or reads any more."""
        return self._users.drop_unsent() + self._owners.drop_unsent()

    def _is_given(self, fork: ForkData) -> bool:
        """Whether `fork`, which this worker handed out, is still to be heard of."""
        return self._owners.counts(fork.rref_id, fork.fork_id) or self._users.is_child(fork.fork_id)

    # ---- questions ---------------------------------------------------------------------------------------------

    def is_lost(self, peer: Incarnation) -> bool:
        """Whether the life `peer` is over, as far as this worker remembers."""
        return peer in self._lost

    def user_state(self, fork_id: ForkId) -> UserState:
        """The state of this worker's fork `fork_id`."""
        return self._users.state(fork_id)

    def owner_state(self, rref_id: RRefId) -> OwnerState:
        """What this worker, the owner, knows of `rref_id`."""
        return self._owners.state(rref_id)

    def owned_forks(self) -> dict[RRefId, dict[ForkId, Incarnation]]:
        """The forks of this worker's RRefs with the lives that hold them."""
        return {rref_id: self._owners.forks(rref_id) for rref_id in self._owners}

    def users_by_owner(self, at_most: int) -> Counter[Incarnation]:
        """How many forks this worker holds of RRefs of which owner; so many are looked at."""
        return self._users.by_owner(at_most)

    @property
    def num_owned(self) -> int:
        """RRefs of this worker that somebody uses."""
        return len(self._owners)

    @property
    def num_users(self) -> int:
        """Forks that this worker holds."""
        return len(self._users)

    @property
    def num_unconfirmed_users(self) -> int:
        """Forks that wait for their owner's answer."""
        return self._users.num_unconfirmed

    @property
    def num_children(self) -> int:
        """Forks that this worker handed out as a user and that were not accepted yet."""
        return self._users.num_children

    @property
    def num_sent_children(self) -> int:
        """Those of `num_children` that are known to have left for somebody."""
        return self._users.num_sent_children

    @property
    def num_sent_owned(self) -> int:
        """Those of `num_owned` that are waited for, or have a fork that is known to have left for somebody."""
        return self._owners.num_sent
