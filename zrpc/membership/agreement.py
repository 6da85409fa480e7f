"""Whether the workers of a group say the same of what all must say the same of. Pure.

Each says it on its card. Every worker looks at the cards of all, so all come to the same end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.membership.group import Member

REGISTERED = "registered"
"""What the card says of a worker that unpickles nothing, and that nobody therefore sends a pickle."""


def check_agreement(members: Sequence[Member]) -> None:
    """See whether all unpickle, or none does.

    Raises:
        ConfigError: some do; the message names some of both kinds.
    """
    registered = [member.info.name for member in members if member.card.get(REGISTERED)]
    others = [member.info.name for member in members if not member.card.get(REGISTERED)]
    if registered and others:
        raise ConfigError(
            f"the workers of this group differ in what they unpickle: {_some(registered)} have allow='registered', and "
            f"{_some(others)} have not. Give all of them the same allow in RpcBackendOptions, or by ZRPC_ALLOW"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
