"""Start-up, calls and shutdown against the number of workers: `make bench-scaling`, or `python -m benchmarks.scaling`.

python -m benchmarks.scaling                                     all: about 6 minutes on 2 cores
python -m benchmarks.scaling --workers 2,16,64 --modes zrpc-file,zrpc-broker

The table is printed; with `--out` it is written there too, with a picture. A group that fails, or is
not done with a step in time, is a point "failed", with its error under the table; larger groups of that mode are then
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT, facts, record
from benchmarks.scaling.modes import MODES
from benchmarks.scaling.point import Point
from benchmarks.scaling.report import draw, markdown

SIZES = (2, 4, 8, 16, 32, 64, 128)
LIMIT_S = 60.0
"""For one step of one group, such as `init_rpc` in all of its workers."""
SOME_STEPS = 4
"""A group as a whole gets the time of so many steps."""
RESOLVER = "timeout:1 attempts:1"
"""For TensorPipe: torch's client of a TCPStore asks the DNS for the name of the store's address. Where no answer comes,
this bounds the wait to a second. zrpc asks for no names."""


def main() -> None:
    """See the module."""
    args = _arguments()
    points: list[Point] = []
    for mode in args.modes:
        for n in args.workers:
            point = _measure(mode, n, args.limit)
            points.append(point)
            print(point, flush=True)
            if point.error is not None:
                break
    here = facts()
    record(markdown(points, here), args.out, "scaling.md")
    if args.out is not None:
        draw(points, here, args.out / "scaling.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=_numbers, default=SIZES, help="sizes of groups, with commas between")
    parser.add_argument("--modes", type=_modes, default=tuple(MODES), help=f"some of {','.join(MODES)}")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for one step of one group")
    parser.add_argument("--out", type=Path, help="where table and picture are written")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _modes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(MODES):
        raise argparse.ArgumentTypeError(f"not {', '.join(unknown)}, but some of {', '.join(MODES)}")
    return names


def _measure(mode: str, n: int, limit_s: float) -> Point:
    """One group, in a process that forks it."""
    command = [sys.executable, "-m", "benchmarks.scaling.group", mode, str(n), str(limit_s)]
    environment = {"RES_OPTIONS": RESOLVER, **os.environ} if mode == "tensorpipe" else dict(os.environ)
    group = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = group.communicate(timeout=SOME_STEPS * limit_s)
    except subprocess.TimeoutExpired:
        return Point(mode, n, error=f"no end within {SOME_STEPS * limit_s:g} s")
    finally:
        _end(group)
    if group.returncode:
        return Point(
            mode, n, error=f"exit code {group.returncode}: {(err.strip() or 'without a word').splitlines()[-1]}"
        )
    return Point(**json.loads(out.splitlines()[-1]))


def _end(group: subprocess.Popen[str]) -> None:
    """End whatever is left of it, its workers included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group.pid, signal.SIGKILL)
    group.communicate()


if __name__ == "__main__":
    main()
