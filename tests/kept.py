"""What a worker keeps of references, autograd contexts and calls. Nothing of it is to be left once all work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zrpc.agent.current import current_agent
from zrpc.autograd.service import AutogradService
from zrpc.rref.context import RRefContext

if TYPE_CHECKING:
    from zrpc.rref.actions import Action
    from zrpc.rref.table import RRefTable


def kept() -> dict[str, int]:
    """The counts that are not 0, under the names that torch gives them, where it has them."""
    agent = current_agent()
    counts: dict[str, Any] = {key: num for key, num in agent.counts().items() if key.endswith("active_calls")}
    if AutogradService in agent.extensions:
        counts.update(agent.extensions[AutogradService].debug_info())
    if RRefContext in agent.extensions:
        context: RRefContext = agent.extensions[RRefContext]
        counts.update(context.debug_info())

        def count(table: RRefTable) -> list[Action]:
            counts.update(num_users=table.num_users, num_children=table.num_children)
            return []

        context.decide(count)
    return {key: int(num) for key, num in counts.items() if int(num)}
