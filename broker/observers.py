"""Letting in observers, which look into a group and are no members of it.

An observer is in the room of its group, so that workers and it can reach each other, and on no list of members: no
worker is told of it. It may ask again and again, as the group may be another one by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.wire.messages import Refused
from zrpc.wire.observing import OBSERVER_NAME, Attached
from zrpc_broker.actions import Action, Admit, Dismiss, Tell

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.keyring import Keyring
    from zrpc.wire.observing import Attach
    from zrpc_broker.directory import Directory

NO_GROUP = "there is no such group here"


def attach(directory: Directory, keyring: Keyring | None, source: Incarnation, wanted: Attach) -> list[Action]:
    """`source` wants to look into a group."""
    if source in directory:
        return [Tell(source, Refused("this is a worker, and no observer"))]
    if keyring is not None:
        keyring.reload()
        reason = keyring.why_not_name(source, OBSERVER_NAME)
        if reason is not None:
            return [Tell(source, Refused(reason))]
    run = directory.current(wanted.group)
    if run is None:
        return [Dismiss(source), Tell(source, Attached([], 0, NO_GROUP))]
    members = [[s.incarnation, s.name, s.rank, s.card] for s in sorted(run.seats.values(), key=lambda s: s.rank)]
    told = Attached(members, run.world_size, run.phase.value)
    return [Dismiss(source), Admit(source, run.room), Tell(source, told)]
