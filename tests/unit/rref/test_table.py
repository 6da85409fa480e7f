"""The reference-counting table, one situation at a time."""

from __future__ import annotations

import pytest

from zrpc.errors import ProtocolError
from zrpc.ids import GlobalId
from zrpc.rref.actions import AskOwner, Orphan, Release, Tell, Unmade
from zrpc.rref.owners import UNSENT, Availability, OwnerTable, Remembered
from zrpc.rref.states import (
    OWNER_TRANSITIONS,
    USER_TRANSITIONS,
    OwnerEvent,
    OwnerState,
    UserEvent,
    UserState,
    step,
)
from zrpc.rref.table import RRefTable
from zrpc.wire.messages import RRefChildAccept, RRefCreationFailed, RRefForkRequest, RRefUserDelete

OWNER, CREATOR, USER = b"owner", b"creator", b"user"
R, F = GlobalId(1, 0, CREATOR), GlobalId(1, 1, CREATOR)
"""An RRef that CREATOR makes on OWNER, and CREATOR's fork of it."""
G = GlobalId(1, 2, CREATOR)
"""CREATOR's fork for USER."""
MINE, LENT = GlobalId(0, 0, OWNER), GlobalId(0, 1, OWNER)
"""An RRef that OWNER made itself, and the fork it hands out."""
NEXT_USER = b"user 2"
"""The worker that comes under USER's rank after it."""


@pytest.fixture
def owner() -> RRefTable:
    return RRefTable(OWNER)


@pytest.fixture
def creator() -> RRefTable:
    table = RRefTable(CREATOR)
    table.create(R, F, OWNER)
    return table


def test_every_state_is_in_a_line_and_has_a_way_out() -> None:
    for transitions, states in ((OWNER_TRANSITIONS, OwnerState), (USER_TRANSITIONS, UserState)):
        assert {state for state, _ in transitions} == set(states)
        assert set(transitions.values()) == set(states)


def test_an_impossible_event_names_subject_state_and_event() -> None:
    with pytest.raises(ProtocolError, match=r"fork 7 is LEAVING \(.*\): SHARED \(.*\) is impossible"):
        step(USER_TRANSITIONS, "fork 7", UserState.LEAVING, UserEvent.SHARED)
    with pytest.raises(ProtocolError, match=r"UNKNOWN.*EMPTIED"):
        step(OWNER_TRANSITIONS, R, OwnerState.UNKNOWN, OwnerEvent.EMPTIED)


def test_a_plain_life(owner: RRefTable, creator: RRefTable) -> None:
    assert owner.creation_arrived(R, F, CREATOR) == []
    assert creator.acknowledged(F) == []
    assert owner.value_wanted(R, F, CREATOR) is Availability.HERE
    assert creator.user_dropped(F) == [Tell(OWNER, RRefUserDelete(R, F))]
    assert owner.user_deleted(R, F) == [Release(R)]
    assert (owner.num_owned, creator.num_users) == (0, 0)
    assert owner.owner_state(R) is OwnerState.UNUSED


def test_the_delete_waits_for_the_answer_and_for_the_children(creator: RRefTable) -> None:
    creator.share_used(F, G)
    assert creator.user_dropped(F) == []
    assert creator.acknowledged(F) == []
    assert creator.user_state(F) is UserState.LEAVING
    assert creator.child_accepted(G) == [Tell(OWNER, RRefUserDelete(R, F))]
    assert creator.child_accepted(G) == []


def test_a_fork_from_a_user_asks_the_owner_then_tells_its_parent() -> None:
    user = RRefTable(USER)
    assert user.receive(R, G, OWNER, CREATOR) == [AskOwner(OWNER, RRefForkRequest(R, G))]
    assert user.num_unconfirmed_users == 1
    assert user.acknowledged(G) == [Tell(CREATOR, RRefChildAccept(G))]
    assert user.user_state(G) is UserState.CONFIRMED


def test_a_fork_from_the_owner_is_counted_already(owner: RRefTable) -> None:
    owner.share_owned(MINE, LENT)
    owner.sent(MINE, LENT, USER)
    user = RRefTable(USER)
    assert user.receive(MINE, LENT, OWNER, OWNER) == []
    assert user.user_dropped(LENT) == [Tell(OWNER, RRefUserDelete(MINE, LENT))]
    assert owner.user_deleted(MINE, LENT) == [Release(MINE)]


def test_an_unannounced_fork_from_the_owner_says_who_holds_it(owner: RRefTable) -> None:
    owner.share_owned(MINE, LENT)
    request = RRefForkRequest(MINE, LENT)
    assert RRefTable(USER).receive(MINE, LENT, OWNER, OWNER, announced=False) == [Tell(OWNER, request)]
    owner.fork_requested(MINE, LENT, USER)
    assert owner.owned_forks() == {MINE: {LENT: USER}}
    assert owner.peer_lost(USER) == [Release(MINE)]


def test_a_late_fork_request_is_ignored(owner: RRefTable) -> None:
    owner.creation_arrived(R, F, CREATOR)
    owner.fork_requested(R, G, USER)
    owner.user_deleted(R, G)
    owner.fork_requested(R, G, USER)
    assert owner.owned_forks() == {R: {F: CREATOR}}
    assert owner.user_deleted(R, F) == [Release(R)]


def test_a_fork_request_for_what_nobody_uses_any_more_is_ignored(owner: RRefTable) -> None:
    owner.creation_arrived(R, F, CREATOR)
    owner.user_deleted(R, F)
    owner.fork_requested(R, G, USER)
    assert owner.num_owned == 0
    assert owner.value_wanted(R, G, USER) is Availability.REFUSED


def test_a_creation_after_its_delete_is_released_at_once(owner: RRefTable) -> None:
    assert owner.user_deleted(R, F) == []
    assert owner.creation_arrived(R, F, CREATOR) == [Release(R)]
    assert owner.num_owned == 0


def test_users_known_before_the_creation_keep_it(owner: RRefTable) -> None:
    owner.fork_requested(R, G, USER)
    assert owner.owner_state(R) is OwnerState.AWAITED
    owner.user_deleted(R, F)
    assert owner.creation_arrived(R, F, CREATOR) == []
    assert owner.owned_forks() == {R: {G: USER}}


def test_a_fetch_before_the_creation_waits_and_one_after_the_delete_is_refused(owner: RRefTable) -> None:
    assert owner.value_wanted(R, F, CREATOR) is Availability.AWAITED
    assert owner.num_owned == 1
    assert owner.user_deleted(R, F) == [Unmade(R), Release(R)]
    assert owner.value_wanted(R, F, CREATOR) is Availability.REFUSED
    assert owner.num_owned == 0


def test_a_waiting_peer_that_dies_leaves_nothing(owner: RRefTable) -> None:
    assert owner.value_wanted(R, G, USER) is Availability.AWAITED
    assert owner.peer_lost(USER) == [Unmade(R), Release(R)]
    assert owner.num_owned == 0
    assert owner.value_wanted(R, G, USER) is Availability.REFUSED


def test_a_creator_that_dies_before_its_creation_comes(owner: RRefTable) -> None:
    owner.fork_requested(R, G, USER)
    assert owner.value_wanted(R, G, USER) is Availability.AWAITED
    assert owner.peer_lost(CREATOR) == [Orphan(R)]
    assert owner.value_wanted(R, G, USER) is Availability.HERE
    assert owner.owner_state(R) is OwnerState.ORPHANED
    assert owner.user_deleted(R, G) == [Release(R)]
    assert owner.num_owned == 0


def test_a_creator_that_is_known_to_be_dead_is_not_waited_for(owner: RRefTable) -> None:
    owner.peer_lost(CREATOR)
    owner.fork_requested(R, G, USER)
    assert owner.value_wanted(R, G, USER) is Availability.REFUSED
    assert owner.came_home(R, G, USER) == (Availability.REFUSED, [Tell(USER, RRefChildAccept(G))])
    assert owner.num_owned == 0


def test_what_a_lost_worker_still_says_is_ignored_and_what_its_successor_says_is_not(owner: RRefTable) -> None:
    owner.share_owned(MINE, LENT)
    assert owner.peer_lost(USER) == []
    owner.fork_requested(MINE, G, USER)
    assert owner.owned_forks() == {MINE: {LENT: UNSENT}}
    assert owner.sent(MINE, LENT, USER) == [Release(MINE)]
    assert owner.creation_arrived(R, F, CREATOR) == []
    owner.fork_requested(R, G, USER)
    assert owner.owned_forks() == {R: {F: CREATOR}}
    owner.fork_requested(R, G, NEXT_USER)
    assert owner.owned_forks() == {R: {F: CREATOR, G: NEXT_USER}}
    assert owner.peer_lost(USER) == []
    assert owner.owned_forks() == {R: {F: CREATOR, G: NEXT_USER}}


def test_a_creation_from_a_lost_worker_is_released_at_once(owner: RRefTable) -> None:
    owner.peer_lost(CREATOR)
    assert owner.creation_arrived(R, F, CREATOR) == [Release(R)]
    assert owner.num_owned == 0


def test_a_lost_owner(creator: RRefTable) -> None:
    creator.share_used(F, G)
    creator.acknowledged(F)
    assert creator.peer_lost(OWNER) == []
    assert creator.user_state(F) is UserState.ORPHANED
    assert creator.num_children == 0
    assert creator.user_dropped(F) == []
    assert creator.num_users == 0


def test_a_fork_whose_owner_is_lost_still_frees_its_parent() -> None:
    user = RRefTable(USER)
    user.receive(R, G, OWNER, CREATOR)
    assert user.peer_lost(OWNER) == [Tell(CREATOR, RRefChildAccept(G))]
    late = RRefTable(USER)
    late.peer_lost(OWNER)
    assert late.receive(R, G, OWNER, CREATOR) == [Tell(CREATOR, RRefChildAccept(G))]
    assert late.user_state(G) is UserState.ORPHANED


def test_a_child_of_a_lost_worker_is_not_waited_for(creator: RRefTable) -> None:
    creator.acknowledged(F)
    creator.share_used(F, G)
    assert creator.sent(R, G, USER) == []
    assert creator.user_dropped(F) == []
    assert creator.peer_lost(USER) == [Tell(OWNER, RRefUserDelete(R, F))]


def test_what_is_not_sent_is_not_counted(owner: RRefTable, creator: RRefTable) -> None:
    owner.share_owned(MINE, LENT)
    assert owner.unsent(MINE, LENT) == [Release(MINE)]
    creator.share_used(F, G)
    creator.acknowledged(F)
    creator.user_dropped(F)
    assert creator.unsent(R, G) == [Tell(OWNER, RRefUserDelete(R, F))]


def test_an_own_rref_comes_home(owner: RRefTable) -> None:
    owner.share_owned(MINE, LENT)
    assert owner.came_home(MINE, LENT, OWNER) == (Availability.HERE, [Release(MINE)])
    owner.creation_arrived(R, F, CREATOR)
    assert owner.came_home(R, G, CREATOR) == (Availability.HERE, [Tell(CREATOR, RRefChildAccept(G))])
    assert owner.owned_forks() == {R: {F: CREATOR}}


def test_remote_to_oneself(owner: RRefTable) -> None:
    owner.begin_here(MINE)
    owner.share_owned(MINE, LENT)
    assert owner.finish_here(MINE) == []
    assert owner.user_deleted(MINE, LENT) == [Release(MINE)]


def test_a_fork_that_came_twice_is_impossible() -> None:
    user = RRefTable(USER)
    user.receive(R, G, OWNER, CREATOR)
    with pytest.raises(ProtocolError, match=r"fork .* is FORKING .* CAME_FROM_USER"):
        user.receive(R, G, OWNER, CREATOR)


def test_failed_creations_are_deleted_all_the_same(creator: RRefTable) -> None:
    assert creator.failed(F) == [Tell(OWNER, RRefCreationFailed(R))]
    assert creator.user_state(F) is UserState.DOUBTFUL
    with pytest.raises(ProtocolError, match="DOUBTFUL"):
        creator.share_used(F, G)
    assert creator.user_dropped(F) == [Tell(OWNER, RRefUserDelete(R, F))]


def test_who_waits_for_a_creation_that_failed_is_told(owner: RRefTable) -> None:
    """Its call may have been lost, or dropped with its time limit over: then nothing would ever come."""
    owner.fork_requested(R, G, USER)
    assert owner.value_wanted(R, G, USER) is Availability.AWAITED
    assert owner.creation_failed(R) == [Unmade(R)]
    assert owner.creation_failed(R) == [Unmade(R)]
    assert owner.value_wanted(R, G, USER) is Availability.REFUSED
    assert owner.owned_forks() == {R: {G: USER}}, "they count all the same: the call may still come"
    assert owner.user_deleted(R, G) == [Unmade(R), Release(R)]


def test_who_asks_after_a_failed_creation_is_refused(owner: RRefTable) -> None:
    assert owner.creation_failed(R) == []
    assert owner.value_wanted(R, G, USER) is Availability.REFUSED
    assert owner.num_owned == 0


def test_a_creation_that_failed_and_comes_late_is_as_good_as_any(owner: RRefTable) -> None:
    owner.fork_requested(R, G, USER)
    owner.creation_failed(R)
    assert owner.creation_arrived(R, F, CREATOR) == []
    assert owner.value_wanted(R, G, USER) is Availability.HERE
    assert owner.creation_failed(R) == [], "a repetition"
    assert owner.owned_forks() == {R: {F: CREATOR, G: USER}}


def test_shutdown(owner: RRefTable, creator: RRefTable) -> None:
    creator.acknowledged(F)
    assert creator.drop_all_users() == [Tell(OWNER, RRefUserDelete(R, F))]
    assert creator.drop_all_users() == []
    owner.value_wanted(R, F, CREATOR)
    assert owner.drop_unforked_owners() == [Unmade(R), Release(R)]


def test_memory_of_ended_forks_is_bounded() -> None:
    table = OwnerTable(OWNER, remembered_max=2)
    for local_id in range(10):
        rref_id, fork_id = GlobalId(1, 2 * local_id, CREATOR), GlobalId(1, 2 * local_id + 1, CREATOR)
        table.created(rref_id, fork_id, CREATOR)
        table.ended(rref_id, fork_id)
    assert (len(table._ended), len(table._unused)) == (2, 2)
    remembered = Remembered(1)
    remembered.add(F)
    remembered.add(G)
    assert F not in remembered
    assert G in remembered


def test_the_oldest_are_forgotten_and_never_many_at_once() -> None:
    remembered = Remembered(640)
    ids = [GlobalId(rank, local_id) for local_id in range(1000) for rank in (0, 1, 2)]
    for item in ids:
        remembered.add(item)
        assert len(remembered) <= 640
    kept = [item for item in ids if item in remembered]
    assert kept == ids[-len(kept) :]
    assert len(kept) >= 630
    remembered.discard(kept[0])
    assert kept[0] not in remembered
