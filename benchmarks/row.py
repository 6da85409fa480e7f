"""One line of a table: what is called, how often, and in which unit it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GB = 1 << 30
"""2^30 bytes."""
QUICKER = 10
"""`--quick` makes so many times fewer calls."""
CALLS_MIN = 2
ROW_S = 3.0
"""A row takes no longer, as far as `CALLS_MIN` allows: some contenders need seconds for 256 MB."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: its name on the command line.
        label: its name in the table.
        unit: of its value: `µs` (less is better), `calls/s` or `GB/s` (more is).
        prepare: given a contender, checks that it gives the right answer and returns what is timed.
        calls: how often that is called in a round, at most.
        work: calls, or GB moved, in one call of it.
        torch_only: only for those who speak torch.distributed.rpc.
    """

    key: str
    label: str
    unit: str
    prepare: Callable[[Any], Callable[[], object]]
    calls: int
    work: float = 1.0
    torch_only: bool = False

    @property
    def less_is_better(self) -> bool:
        return self.unit == "µs"

    def count(self, one_s: float, quick: bool) -> int:
        """How many calls are timed, where the first took `one_s` seconds."""
        calls = self.calls // QUICKER if quick else self.calls
        return max(CALLS_MIN, min(calls, int(ROW_S / one_s)))

    def value(self, stats: Mapping[str, float]) -> float:
        """The row's value, from the seconds that the calls took: a median for a time, a mean for a rate."""
        return stats["median"] * 1e6 if self.less_is_better else self.work / stats["mean"]
