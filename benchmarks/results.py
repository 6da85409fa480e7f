"""What was measured: by contender and row, a value a round, or why there is none."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.contender import CONTENDERS
from benchmarks.rows import ROWS

if TYPE_CHECKING:
    from benchmarks.row import Row

NOT_INSTALLED = "not installed"
FAILED = "failed"
NOT_OFFERED = "-"


@dataclass
class Results:
    """The values of all rounds.

    Attributes:
        values: (contender, row) -> its value in each round that gave one.
        missing: contender -> why it gave none at all.
    """

    contenders: list[str]
    rows: list[str]
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, contender: str, row: str, value: float) -> None:
        """Take in what one round gave."""
        self.values.setdefault((contender, row), []).append(value)

    def median(self, contender: str, row: str) -> float | None:
        """The median of the rounds; None if there is no value."""
        values = self.values.get((contender, row))
        return statistics.median(values) if values else None

    def cell(self, contender: str, other: str | None = None, *, row: str) -> str:
        """The value as a table shows it, or why there is none; with `other`, how many times better the first is."""
        if other is not None:
            return self._better(contender, other, row)
        value = self.median(contender, row)
        if value is not None:
            return show(value)
        if contender in self.missing:
            return self.missing[contender]
        offered = CONTENDERS[contender].speaks_torch or not ROWS[row].torch_only
        return FAILED if offered else NOT_OFFERED

    def _better(self, first: str, second: str, row: str) -> str:
        """The median of the rounds' ratios."""
        ours, theirs = self.values.get((first, row), []), self.values.get((second, row), [])
        ratios = [_ratio(ROWS[row], a, b) for a, b in zip(ours, theirs, strict=False)]
        return f"{statistics.median(ratios):.2f}x" if ratios else NOT_OFFERED


def show(value: float) -> str:
    """Three digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row, ours: float, theirs: float) -> float:
    return theirs / ours if row.less_is_better else ours / theirs
