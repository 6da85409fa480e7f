"""The states of an RRef on its owner and of a fork on its user, and what each event does to them.

An event that a table has no line for is impossible: `step` raises and names the subject, its state and the event.
Nothing else in this package decides on a next state.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from zrpc.errors import ProtocolError


class OwnerState(Enum):
    """What the owner knows of one RRef."""

    UNKNOWN = "never heard of; its creation may still be on its way"
    AWAITED = "somebody uses it; its creation is still on its way"
    LIVE = "it exists and somebody uses it"
    ORPHANED = "its creator died before the creation came: it will never have a value"
    UNUSED = "nobody but this worker uses it: never shared, or creator or all users are gone; late users are refused"


class OwnerEvent(Enum):
    """What happens to an RRef on its owner."""

    CREATED = "its creation came, or was begun here"
    SHARED = "the owner itself hands out a fork"
    FORKED = "a user asks to be counted"
    USED = "a user or this worker wants the value"
    EMPTIED = "the last user and the last one waiting for it are gone"
    CREATOR_LOST = "the worker that was to create it is gone"


OWNER_TRANSITIONS: dict[tuple[OwnerState, OwnerEvent], OwnerState] = {
    (OwnerState.UNKNOWN, OwnerEvent.CREATED): OwnerState.LIVE,
    (OwnerState.UNKNOWN, OwnerEvent.SHARED): OwnerState.LIVE,
    (OwnerState.UNKNOWN, OwnerEvent.FORKED): OwnerState.AWAITED,
    (OwnerState.UNKNOWN, OwnerEvent.USED): OwnerState.AWAITED,
    (OwnerState.AWAITED, OwnerEvent.CREATED): OwnerState.LIVE,
    (OwnerState.AWAITED, OwnerEvent.SHARED): OwnerState.AWAITED,
    (OwnerState.AWAITED, OwnerEvent.FORKED): OwnerState.AWAITED,
    (OwnerState.AWAITED, OwnerEvent.USED): OwnerState.AWAITED,
    (OwnerState.AWAITED, OwnerEvent.EMPTIED): OwnerState.UNKNOWN,
    (OwnerState.AWAITED, OwnerEvent.CREATOR_LOST): OwnerState.ORPHANED,
    (OwnerState.LIVE, OwnerEvent.SHARED): OwnerState.LIVE,
    (OwnerState.LIVE, OwnerEvent.FORKED): OwnerState.LIVE,
    (OwnerState.LIVE, OwnerEvent.USED): OwnerState.LIVE,
    (OwnerState.LIVE, OwnerEvent.EMPTIED): OwnerState.UNUSED,
    (OwnerState.ORPHANED, OwnerEvent.SHARED): OwnerState.ORPHANED,
    (OwnerState.ORPHANED, OwnerEvent.FORKED): OwnerState.ORPHANED,
    (OwnerState.ORPHANED, OwnerEvent.USED): OwnerState.ORPHANED,
    (OwnerState.ORPHANED, OwnerEvent.EMPTIED): OwnerState.UNUSED,
    (OwnerState.UNUSED, OwnerEvent.CREATED): OwnerState.LIVE,
    (OwnerState.UNUSED, OwnerEvent.SHARED): OwnerState.LIVE,
    (OwnerState.UNUSED, OwnerEvent.FORKED): OwnerState.UNUSED,
    (OwnerState.UNUSED, OwnerEvent.USED): OwnerState.UNUSED,
}


class UserState(Enum):
    """What a user knows of one of its forks."""

    CREATING = "made by remote(); the owner has not answered yet"
    FORKING = "came from another user; the owner has not acknowledged it yet"
    CONFIRMED = "the owner counts it"
    DOUBTFUL = "the owner was asked and the asking failed: it may count it or not"
    ORPHANED = "the owner is gone"
    LEAVING_UNCONFIRMED = "dropped here; the owner's answer must come before it may be deleted"
    LEAVING = "dropped here; deleted as soon as the last child is accepted"
    GONE = "not here: it never was, or it is forgotten"


class UserEvent(Enum):
    """What happens to a fork on its user."""

    CREATED = "remote() is about to ask the owner for it"
    CAME_FROM_OWNER = "the owner handed it out, and counts it"
    CAME_FROM_USER = "another user handed it out"
    ACKNOWLEDGED = "the owner counts it"
    FAILED = "asking the owner failed"
    SHARED = "a child fork is handed out"
    DROPPED = "the program let go of it, or the worker shuts down"
    SETTLED = "it is leaving and no child is pending"
    OWNER_LOST = "the owner died or left"


USER_TRANSITIONS: dict[tuple[UserState, UserEvent], UserState] = {
    (UserState.GONE, UserEvent.CREATED): UserState.CREATING,
    (UserState.GONE, UserEvent.CAME_FROM_OWNER): UserState.CONFIRMED,
    (UserState.GONE, UserEvent.CAME_FROM_USER): UserState.FORKING,
    (UserState.CREATING, UserEvent.ACKNOWLEDGED): UserState.CONFIRMED,
    (UserState.CREATING, UserEvent.FAILED): UserState.DOUBTFUL,
    (UserState.CREATING, UserEvent.SHARED): UserState.CREATING,
    (UserState.CREATING, UserEvent.DROPPED): UserState.LEAVING_UNCONFIRMED,
    (UserState.CREATING, UserEvent.OWNER_LOST): UserState.ORPHANED,
    (UserState.FORKING, UserEvent.ACKNOWLEDGED): UserState.CONFIRMED,
    (UserState.FORKING, UserEvent.FAILED): UserState.DOUBTFUL,
    (UserState.FORKING, UserEvent.SHARED): UserState.FORKING,
    (UserState.FORKING, UserEvent.DROPPED): UserState.LEAVING_UNCONFIRMED,
    (UserState.FORKING, UserEvent.OWNER_LOST): UserState.ORPHANED,
    (UserState.CONFIRMED, UserEvent.SHARED): UserState.CONFIRMED,
    (UserState.CONFIRMED, UserEvent.DROPPED): UserState.LEAVING,
    (UserState.CONFIRMED, UserEvent.OWNER_LOST): UserState.ORPHANED,
    (UserState.DOUBTFUL, UserEvent.DROPPED): UserState.LEAVING,
    (UserState.DOUBTFUL, UserEvent.OWNER_LOST): UserState.ORPHANED,
    (UserState.ORPHANED, UserEvent.ACKNOWLEDGED): UserState.ORPHANED,
    (UserState.ORPHANED, UserEvent.FAILED): UserState.ORPHANED,
    (UserState.ORPHANED, UserEvent.OWNER_LOST): UserState.ORPHANED,
    (UserState.ORPHANED, UserEvent.DROPPED): UserState.GONE,
    (UserState.LEAVING_UNCONFIRMED, UserEvent.ACKNOWLEDGED): UserState.LEAVING,
    (UserState.LEAVING_UNCONFIRMED, UserEvent.FAILED): UserState.LEAVING,
    (UserState.LEAVING_UNCONFIRMED, UserEvent.OWNER_LOST): UserState.GONE,
    (UserState.LEAVING, UserEvent.SETTLED): UserState.GONE,
    (UserState.LEAVING, UserEvent.OWNER_LOST): UserState.GONE,
}

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


def step(transitions: dict[tuple[S, E], S], subject: object, state: S, event: E) -> S:
    """The state that `event` leads to.

    Raises:
        ProtocolError: `event` cannot happen to `subject` in `state`.
    """
    try:
        return transitions[state, event]
    except KeyError:
        raise ProtocolError(
            f"{subject} is {state.name} ({state.value}): {event.name} ({event.value}) is impossible in that state"
        ) from None
