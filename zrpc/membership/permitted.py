"""A group in which each worker has only a name and rank that its key may claim.

What: what a store says of a member is compared with the keyring. Of a static group all workers refuse to be members
where one has a name that it may not have; in a dynamic one such a newcomer is not told of: it is unknown, and nothing
that it sends is served. With a broker this is not needed: the broker decides.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from zrpc.errors import RefusedError

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.keyring import Keyring
    from zrpc.membership.group import Group, Member, OnJoined, OnLeft

log = logging.getLogger("zrpc")

LINGER_S = 2.0
"""How long a worker that refuses a group stays, as the others may learn of its members through it."""


def permitted(group: Group, keyring: Keyring | None) -> Group:
    """`group` as `keyring` lets it be; itself, where there is none."""
    return group if keyring is None else PermittedGroup(group, keyring)


class PermittedGroup:
    """A group, seen through a keyring.

    Args:
        group: the group.
        keyring: says which names and ranks a worker may have.
    """

    def __init__(self, group: Group, keyring: Keyring) -> None:
        self._group = group
        self._keyring = keyring

    def join(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        incarnation: Incarnation,
        card: dict[str, Any],
        timeout_s: float,
    ) -> tuple[Member, list[Member]]:
        """See `Group.join`.

        Raises:
            RefusedError: this worker's key may not claim its name or rank; or, in a static group, another worker's.
        """
        self._keyring.reload()
        if (reason := self._keyring.refusal(incarnation, name, rank)) is not None:
            raise RefusedError(reason)
        me, members = self._group.join(name, rank, world_size, incarnation, card, timeout_s)
        refusals = {member.incarnation: self._refusal(member) for member in members}
        reasons = [reason for reason in refusals.values() if reason is not None]
        if world_size and reasons:
            self._group.linger(LINGER_S)
            raise RefusedError("; ".join(reasons))
        for reason in reasons:
            log.warning("%s", reason)
        return me, [member for member in members if refusals[member.incarnation] is None]

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """See `Group.watch`."""

        def on_permitted(member: Member) -> None:
            if (reason := self._refusal(member)) is None:
                on_joined(member)
            else:
                log.warning("%s", reason)

        self._group.watch(on_permitted, on_left)

    def refresh(self) -> None:
        """See `Group.refresh`."""
        self._group.refresh()

    def note_lost(self, incarnation: Incarnation) -> None:
        """See `Group.note_lost`."""
        self._group.note_lost(incarnation)

    def linger(self, timeout_s: float) -> None:
        """See `Group.linger`."""
        self._group.linger(timeout_s)

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        """See `Group.leave`."""
        self._group.leave(timeout_s, at_exit=at_exit)

    def _refusal(self, member: Member) -> str | None:
        self._keyring.reload()
        return self._keyring.refusal(member.incarnation, member.info.name, member.info.id)
