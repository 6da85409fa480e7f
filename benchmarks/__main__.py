"""zrpc beside TensorPipe, RPyC, gRPC and Ray: `make bench`, or `python -m benchmarks`.

python -m benchmarks                              all, three rounds: about 10 minutes on 2 cores
python -m benchmarks --rounds 1 --quick           a look: about 2 minutes
python -m benchmarks --only zrpc,grpc --rows noop,sink_16MB
python -m benchmarks --limits                     zrpc and TensorPipe beside what the machine allows: about 3 minutes

The contenders run in turn, A B C A B C, each in fresh processes. The table is printed and written to
benchmarks/results/contenders.md (with limits to limits.md), the picture beside it. A contender that is not installed
stays in the table, which says so.
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
from benchmarks.machine import ROOT, facts
from benchmarks.plots import draw
from benchmarks.results import FAILED, NOT_INSTALLED, Results
from benchmarks.rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LIMIT_S = 240.0
"""For one contender in one round."""
_ALWAYS_NAMED = ("zrpc", "torch", "zmq")
RESULTS = ROOT / "benchmarks" / "results"
FRAMEWORKS = [key for key, entry in CONTENDERS.items() if not entry.is_limit]
LIMITS = ["zrpc", "tensorpipe", "bare-memory", "zrpc-tcp", "tensorpipe-tcp", "bare-zeromq", "bare-tcp"]


def main() -> None:
    """See the module."""
    args = _arguments()
    results = Results(args.only, args.rows)
    results.missing = {key: NOT_INSTALLED for key in args.only if not CONTENDERS[key].is_installed()}
    for round_number in range(1, args.rounds + 1):
        for key in args.only:
            if key in results.missing:
                continue
            began = time.monotonic()
            for row, value in _measure(key, args.rows, args.quick).items():
                results.add(key, row, value)
            print(f"round {round_number}: {CONTENDERS[key].label}: {time.monotonic() - began:.0f} s", flush=True)
    for key in args.only:
        if key not in results.missing and not any(results.values.get((key, row)) for row in args.rows):
            results.missing[key] = FAILED
    measured = [CONTENDERS[key] for key in args.only]
    here = facts(*dict.fromkeys(entry.distribution for entry in measured if entry.needs not in _ALWAYS_NAMED))
    args.out.mkdir(parents=True, exist_ok=True)
    table = results.markdown(here, args.rounds)
    name = "limits" if args.only is LIMITS else "contenders"
    (args.out / f"{name}.md").write_text(table)
    draw(results, here, args.out / f"{name}.png")
    print(f"\n{table}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", type=_some_of(CONTENDERS), default=FRAMEWORKS, help="contenders, by their keys")
    which.add_argument("--limits", dest="only", action="store_const", const=LIMITS, help="zrpc beside the limits")
    parser.add_argument("--rows", type=_some_of(ROWS), default=list(ROWS), help="rows, by their keys")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where table and picture go")
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
