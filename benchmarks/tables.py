"""The files that `python -m benchmarks` makes: which contenders and rows stand in each, and what is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.contender import CONTENDERS
from benchmarks.rows import ROWS

if TYPE_CHECKING:
    from benchmarks.results import Results


@dataclass(frozen=True)
class Table:
    """One table, one file.

    Attributes:
        columns: the key of a contender: its value. A pair of keys: how many times better the first is than the second.
        torch_rows: whether it shows rows that are only of those who speak torch.distributed.rpc.
    """

    columns: tuple[str | tuple[str, str], ...]
    torch_rows: bool = False

    @property
    def contenders(self) -> list[str]:
        """Those that must be measured for it."""
        return [column for column in self.columns if isinstance(column, str)]

    @property
    def rows(self) -> list[str]:
        """The rows that must be measured for it."""
        return [key for key, row in ROWS.items() if self.torch_rows or not row.torch_only]

    def markdown(self, results: Results, facts: str) -> str:
        """The file: what it depends on, and the table of all that was measured of it."""
        shown = [column for column in self.columns if set(_keys(column)) <= set(results.contenders)]
        head = ["", "unit", *(" : ".join(CONTENDERS[key].label for key in _keys(column)) for column in shown)]
        lines = [head, ["---", "---", *["---:"] * len(shown)]]
        for key in self.rows:
            if key in results.rows:
                cells = [results.cell(*_keys(column), row=key) for column in shown]
                lines.append([ROWS[key].label, ROWS[key].unit, *cells])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{facts}.\n\n{table}\n"


def _keys(column: str | tuple[str, str]) -> tuple[str, ...]:
    return (column,) if isinstance(column, str) else column


TABLES = {
    "tensorpipe": Table(
        (
            *("zrpc", "tensorpipe", ("zrpc", "tensorpipe"), "bare-memory"),
            *("zrpc-tcp", "tensorpipe-tcp", ("zrpc-tcp", "tensorpipe-tcp"), "bare-zeromq", "bare-tcp"),
        ),
        torch_rows=True,
    ),
    "broker": Table(
        ("zrpc", "zrpc-broker", ("zrpc-broker", "zrpc"), "zrpc-tcp", "zrpc-relay", ("zrpc-relay", "zrpc-tcp"))
    ),
    "contenders": Table(
        ("zrpc", "tensorpipe", "zrpc-tcp", "tensorpipe-tcp", "zrpc-broker", "rpyc", "grpc", "ray"),
    ),
}
"""By the names of their files."""
