"""What there is to see of the references of a worker: how many there are, of whom, and of which types.

Threads: called under the lock of the context (`RRefContext.looked_at`), so nothing here waits, or runs code of users.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zrpc.ids import RRefId
    from zrpc.rref.cell import Cell
    from zrpc.rref.table import RRefTable

LOOK_MAX = 100_000
"""So many values and forks are looked at, at most."""


def debug_counts(table: RRefTable | None, _cells: dict[RRefId, Cell], num_sending: int) -> dict[str, str]:
    """See `RRefContext.debug_info`."""
    forks = table.owned_forks() if table else {}
    return {
        "num_owner_rrefs": str(len(forks)),
        "num_pending_users": str(table.num_unconfirmed_users if table else 0),
        "num_pending_futures": str(num_sending),
        "num_forks": str(sum(map(len, forks.values()))),
    }


def seen(table: RRefTable | None, cells: dict[RRefId, Cell], num_sending: int) -> dict[str, Any]:
    """Values of this worker by their types, RRefs to others' by their owners, and messages under way about them."""
    types = Counter(cell.kind for cell in islice(cells.values(), LOOK_MAX))
    return {
        "owned": len(cells),
        "owned_types": dict(types.most_common(50)),
        "used_by_owner": {} if table is None else dict(table.users_by_owner(LOOK_MAX)),
        "messages": num_sending,
    }
