"""References that a worker's shutdown would wait for, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.ids import ForkId, Incarnation, RRefId
    from zrpc.rref.actions import Action
    from zrpc.rref.context import RRefContext
    from zrpc.rref.table import RRefTable

MAX_NAMED = 5


def describe_leftovers(context: RRefContext) -> str:
    """The RRefs of this worker that others hold, and what of those of others is not settled; empty: none."""
    owned: dict[RRefId, dict[ForkId, Incarnation]] = {}
    unsettled: list[int] = []

    def look(table: RRefTable) -> list[Action]:
        owned.update(table.owned_forks())
        unsettled.append(table.num_unconfirmed_users + table.num_children)
        return []

    context.decide(look)
    parts = []
    if owned:
        named = [f"{rref_id} by {_holders(context, forks)}" for rref_id, forks in list(owned.items())[:MAX_NAMED]]
        more = f", and {len(owned) - len(named)} more" if len(owned) > len(named) else ""
        parts.append(f"{len(owned)} RRefs of this worker are held ({', '.join(named)}{more})")
    if sum(unsettled):
        parts.append(f"{sum(unsettled)} references to RRefs of others wait for their owners or for new holders")
    return "; ".join(parts)


def _holders(context: RRefContext, forks: dict[ForkId, Incarnation]) -> str:
    members = [context.agent.members.by_incarnation(life) for life in dict.fromkeys(forks.values())]
    names = [member.info.name for member in members if member is not None][:MAX_NAMED]
    return " and ".join(names) or "a message that was not sent, or one under way"
