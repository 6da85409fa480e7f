"""One call with a large tensor to several workers: `rpc.broadcast` beside one `rpc_async` to each.

    python -m benchmarks.broadcast                  4 workers, 16 MiB, on one host and by TCP
    python -m benchmarks.broadcast --workers 8 --mib 64 --rounds 5

In turn, in processes of their own: TensorPipe with one `rpc_async` to each worker, zrpc in the same way, and zrpc with
`broadcast`. Each figure is the median time until all futures are done; the last column is the median over the rounds of
TensorPipe's time divided by that of `broadcast`. What is called returns one number of the tensor, so that it is there.
The table is printed; with `--out` it is written there too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, facts, record
from benchmarks.meeting import at_file, at_tcp
from benchmarks.results import show

KINDS = {"tensorpipe": "TensorPipe, `rpc_async`", "async": "zrpc, `rpc_async`", "broadcast": "zrpc, `broadcast`"}
LINKS = {"host": "one host", "tcp": "TCP"}


def last(values: Any) -> float:
    """What the workers run."""
    return float(values[-1])


def _start(kind: str, rank: int, args: argparse.Namespace) -> Any:
    """`init_rpc`; the module that has the calls."""
    rpc: Any
    if kind == "tensorpipe":
        import torch.distributed.rpc as rpc

        transports: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if args.link == "tcp" else {}
        options: Any = rpc.TensorPipeRpcBackendOptions(init_method=args.init_method, **transports)
    else:
        import zrpc as rpc

        options = rpc.RpcBackendOptions(init_method=args.init_method, shared_memory=args.link == "host")
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=args.workers + 1, rpc_backend_options=options)
    return rpc


def work(kind: str, rank: int, args: argparse.Namespace) -> None:
    """The whole life of one process."""
    import torch

    torch.set_num_threads(1)
    rpc = _start(kind, rank, args)
    if rank == 0:
        values = torch.ones(args.mib << 18)
        names = [f"w{number}" for number in range(1, args.workers + 1)]
        times = []
        for _ in range(args.warm + args.times):
            began = time.perf_counter()
            if kind == "broadcast":
                futures = rpc.broadcast(names, last, args=(values,))
            else:
                futures = [rpc.rpc_async(name, last, args=(values,)) for name in names]
            assert [future.wait() for future in futures] == [1.0] * args.workers
            times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(statistics.median(times[args.warm :])), flush=True)
    rpc.shutdown()


def measure(kind: str, link: str, args: argparse.Namespace) -> float:
    """One run of one kind; ms."""
    with (at_tcp if kind == "tensorpipe" else at_file)() as init_method:
        sizes = [f"--{name}={getattr(args, name)}" for name in ("workers", "mib", "times", "warm")]
        command = [sys.executable, "-m", "benchmarks.broadcast", *sizes, "--kind", kind, "--link", link]
        command += ["--init-method", init_method]
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
            )
            for rank in range(args.workers + 1)
        ]
        told, _ = processes[0].communicate(timeout=300)
        for process in processes[1:]:
            process.communicate(timeout=60)
        return float(json.loads(told.decode().splitlines()[-1]))


def row(link: str, args: argparse.Namespace) -> str:
    """The line of the table for one link."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            found[kind].append(measure(kind, link, args))
    ratios = [theirs / ours for theirs, ours in zip(found["tensorpipe"], found["broadcast"], strict=True)]
    cells = [show(statistics.median(times)) for times in found.values()]
    what = f"{args.mib} MB to {args.workers} workers, {LINKS[link]}"
    return f"| {what} | ms | {' | '.join(cells)} | {statistics.median(ratios):.2f}x |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.broadcast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the table is written")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--link", choices=LINKS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--init-method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind is not None:
        work(args.kind, args.rank, args)
        return
    head = ["", "unit", *KINDS.values(), "`broadcast` : TensorPipe"]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- | {' | '.join(['---:'] * (len(head) - 2))} |"]
    lines += [row(link, args) for link in LINKS]
    record("\n".join([f"{facts()}.", "", *lines, ""]), args.out, "broadcast.md")


if __name__ == "__main__":
    main()
