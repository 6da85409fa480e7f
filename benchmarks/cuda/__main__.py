"""zrpc beside TensorPipe with tensors on one CUDA device: `make gpu`, or `python -m benchmarks.cuda`.

The same program runs on both in turn, A B A B. `better` is how many times better zrpc is, the median over the rounds of
the ratios taken round by round. Under the table stand the pinned copy limits of the machine. All is printed, and
written to benchmarks/results/cuda.md.

    python -m benchmarks.cuda --rounds 5 --only sink_16MB_GBps,autograd_step_us
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.cuda.rows import LOCAL, ROWS
from benchmarks.cuda.worker import MACHINE, TENSORPIPE, ZRPC
from benchmarks.machine import ROOT, facts

LIMIT_S = 300.0

Measured = dict[str, float]


def main() -> None:
    """See the module."""
    args = _arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.cuda: torch finds no CUDA device on this machine")
    rows = args.only or list(ROWS)
    limits = _run(MACHINE, [])
    rounds = [(_run(TENSORPIPE, rows), _run(ZRPC, rows)) for _ in range(args.rounds)]
    text = "\n".join([f"{facts()}, {torch.cuda.get_device_name()}", "", *table(rounds), "", *_lines(limits)])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cuda.md").write_text(f"{text}\n")
    print(text)


def table(rounds: list[tuple[Measured, Measured]]) -> list[str]:
    """The lines of the table: TensorPipe's and zrpc's medians of each row, and their ratio."""
    lines = ["| row | TensorPipe | zrpc | better |", "|---|---|---|---|"]
    for name in rounds[0][0]:
        theirs, ours = [one[name] for one, _ in rounds], [other[name] for _, other in rounds]
        pairs = zip(theirs, ours, strict=True) if name.endswith("_us") else zip(ours, theirs, strict=True)
        ratios = [left / right for left, right in pairs if right]
        better = f"{statistics.median(ratios):.2f}x" if ratios else "-"
        lines.append(f"| {name} | {statistics.median(theirs):.2f} | {statistics.median(ours):.2f} | {better} |")
    return lines


def _lines(limits: Measured) -> list[str]:
    return ["| pinned copy limit |  |", "|---|---|", *(f"| {name} | {limits[name]:.2f} |" for name in LOCAL)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run")
    parser.add_argument("--only", type=_rows, help=f"some of {','.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the results go")
    return parser.parse_args()


def _rows(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ROWS):
        raise argparse.ArgumentTypeError(f"not {', '.join(unknown)}, but some of {', '.join(ROWS)}")
    return names


def _run(peer: str, rows: list[str]) -> Measured:
    """One round of one peer, in processes of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "benchmarks.cuda.worker", peer]
        ranks = (0,) if peer == MACHINE else (1, 0)
        workers = [
            subprocess.Popen([*command, str(rank), str(port), str(out), ",".join(rows)], cwd=ROOT) for rank in ranks
        ]
        try:
            codes = [worker.wait(LIMIT_S) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if any(codes):
            sys.exit(f"benchmarks.cuda: {peer} failed with exit codes {codes}; see above")
        measured: Measured = json.loads(out.read_text())
        return measured


if __name__ == "__main__":
    main()
