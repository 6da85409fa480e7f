"""What was measured: by contender and row, a value a round, or why there is none; and the table of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.contender import CONTENDERS
from benchmarks.rows import ROWS, Row

NOT_INSTALLED = "not installed"
FAILED = "failed"
NOT_OFFERED = "-"
PAIRS = (
    ("zrpc", "tensorpipe"),
    ("zrpc", "bare-memory"),
    ("zrpc-tcp", "tensorpipe-tcp"),
    ("zrpc-tcp", "bare-zeromq"),
    ("zrpc-tcp", "bare-tcp"),
)
"""Of these the table says how many times better the first is."""


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

    def cell(self, contender: str, row: str) -> str:
        """The value as the table shows it, or why there is none."""
        value = self.median(contender, row)
        if value is not None:
            return show(value)
        if contender in self.missing:
            return self.missing[contender]
        offered = CONTENDERS[contender].speaks_torch or not ROWS[row].torch_only
        return FAILED if offered else NOT_OFFERED

    def better(self, first: str, second: str, row: str) -> str:
        """How many times better `first` is: the median of the rounds' ratios."""
        ours, theirs = self.values.get((first, row), []), self.values.get((second, row), [])
        ratios = [_ratio(ROWS[row], a, b) for a, b in zip(ours, theirs, strict=False)]
        return f"{statistics.median(ratios):.2f}x" if ratios else NOT_OFFERED

    def markdown(self, facts: str, rounds: int) -> str:
        """The table, with what it depends on."""
        pairs = [pair for pair in PAIRS if set(pair) <= set(self.contenders)]
        ratios = [f"{CONTENDERS[a].label} : {CONTENDERS[b].label}" for a, b in pairs]
        head = ["", "unit", *(CONTENDERS[key].label for key in self.contenders), *ratios]
        lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
        for key in self.rows:
            cells = [self.cell(contender, key) for contender in self.contenders]
            better = [self.better(a, b, key) for a, b in pairs]
            lines.append([ROWS[key].label, ROWS[key].unit, *cells, *better])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{facts}.\n\n{_EXPLANATION.format(rounds=rounds)}\n\n{table}\n"


_EXPLANATION = """\
Medians of {rounds} round(s); in each round the contenders ran in turn, two processes each on one host, one intra-op \
thread each. Less is better in µs, more in calls/s and GB/s (2^30 bytes; an echo moves its bytes twice). The last \
columns say how many times better zrpc is, as the median of the rounds' ratios."""


def show(value: float) -> str:
    """Three digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row, ours: float, theirs: float) -> float:
    return theirs / ours if row.less_is_better else ours / theirs
