"""zrpc beside TensorPipe, other frameworks and what the machine allows: `make bench`, or `python -m benchmarks`.

python -m benchmarks                              all tables, three rounds: about 15 minutes on 2 cores
python -m benchmarks --tables tensorpipe          one of them: about 5 minutes
python -m benchmarks --only zrpc,grpc --rows noop,sink_16MB --rounds 1 --quick

The contenders run in turn, A B C A B C, each in fresh processes. The tables are printed; with `--out` they are written
there too, a file each, with a picture of one. A contender that is not installed stays in its tables, which say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contender import CONTENDERS
from benchmarks.machine import ROOT, facts, record
from benchmarks.plots import draw
from benchmarks.results import FAILED, NOT_INSTALLED, Results
from benchmarks.rows import ROWS
from benchmarks.tables import TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.tables import Table

LIMIT_S = 240.0
"""For one contender in one round."""
_ALWAYS_NAMED = ("zrpc", "torch", "zmq")
DRAWN = "contenders"
"""The table that is drawn as well."""


def main() -> None:
    """See the module."""
    args = _arguments()
    tables = {name: TABLES[name] for name in args.tables}
    rows = {key: _rows_of(key, tables.values(), args.rows) for key in CONTENDERS if key in args.only}
    rows = {key: keys for key, keys in rows.items() if keys}
    results = Results(list(rows), args.rows)
    results.missing = {key: NOT_INSTALLED for key in rows if not CONTENDERS[key].is_installed()}
    for round_number in range(1, args.rounds + 1):
        for key in rows:
            if key in results.missing:
                continue
            began = time.monotonic()
            for row, value in _measure(key, rows[key], args.quick).items():
                results.add(key, row, value)
            print(f"round {round_number}: {CONTENDERS[key].label}: {time.monotonic() - began:.0f} s", flush=True)
    for key in rows:
        if key not in results.missing and not any(results.values.get((key, row)) for row in rows[key]):
            results.missing[key] = FAILED
    for name, table in tables.items():
        _show(name, table, results, args.out)


def _rows_of(contender: str, tables: Iterable[Table], wanted: list[str]) -> list[str]:
    """Of the rows that are wanted those that a table shows of this contender."""
    shown = {row for table in tables if contender in table.contenders for row in table.rows}
    return [row for row in wanted if row in shown]


def _show(name: str, table: Table, results: Results, out: Path | None) -> None:
    entries = [CONTENDERS[key] for key in table.contenders if key in results.contenders]
    here = facts(*dict.fromkeys(entry.distribution for entry in entries if entry.needs not in _ALWAYS_NAMED))
    record(table.markdown(results, here), out, f"{name}.md")
    if out is not None and name == DRAWN:
        draw(table, results, here, out / f"{name}.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls")
    parser.add_argument("--tables", type=_some_of(TABLES), default=list(TABLES), help="tables, by their names")
    parser.add_argument("--only", type=_some_of(CONTENDERS), default=list(CONTENDERS), help="contenders, by their keys")
    parser.add_argument("--rows", type=_some_of(ROWS), default=list(ROWS), help="rows, by their keys")
    parser.add_argument("--out", type=Path, help="where tables and picture are written")
    return parser.parse_args()


def _some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Parses names with commas between."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = set(names) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(f"not {', '.join(sorted(unknown))}, but some of {', '.join(known)}")
        return names

    return parse


def _measure(key: str, rows: list[str], quick: bool) -> dict[str, float]:
    """One contender in one round: row -> its value, without the rows that failed."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "benchmark.json")
        command = [sys.executable, "-m", "pytest", "-c", "benchmarks/pytest.ini", "benchmarks/bench_contenders.py"]
        command += ["-q", "--contender", key, "--rows", ",".join(rows), f"--benchmark-json={found}"]
        command += ["--quick"] if quick else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{key}: no end within {LIMIT_S:g} s", file=sys.stderr)
            return {}
        if done.returncode:
            print(f"{key}: {done.stdout[-3000:]}{done.stderr[-2000:]}", file=sys.stderr)
        if not found.exists() or not found.stat().st_size:
            return {}
        benchmarks = json.loads(found.read_text())["benchmarks"]
    return {one["extra_info"]["row"]: ROWS[one["extra_info"]["row"]].value(one["stats"]) for one in benchmarks}


if __name__ == "__main__":
    main()
