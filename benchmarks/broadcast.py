"""One call with a large tensor to several workers: `rpc.broadcast` beside one `rpc_async` to each.

    python benchmarks/broadcast.py                  4 workers, 16 MiB, same host
    python benchmarks/broadcast.py --tcp            TCP alone on both sides
    python benchmarks/broadcast.py --workers 8 --mib 64 --rounds 5

In turn, in processes of their own: TensorPipe with one `rpc_async` to each worker, zrpc in the same way, and zrpc with
`broadcast`. Each figure is the median time until all futures are done, in ms; `better` is the median over the rounds of
TensorPipe's time divided by that of `broadcast`. What is called returns one number of the tensor, so that it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

KINDS = ("tensorpipe", "async", "broadcast")


def last(values: Any) -> float:
    """What the workers run."""
    return float(values[-1])


def _start(kind: str, rank: int, args: argparse.Namespace) -> Any:
    """`init_rpc`; the module that has the calls."""
    rpc: Any
    if kind == "tensorpipe":
        import torch.distributed.rpc as rpc

        transports: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if args.tcp else {}
        options: Any = rpc.TensorPipeRpcBackendOptions(init_method=args.init_method, **transports)
    else:
        import zrpc as rpc

        options = rpc.RpcBackendOptions(init_method=args.init_method, shared_memory=not args.tcp)
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


def measure(kind: str, args: argparse.Namespace) -> float:
    """One run of one kind; ms."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--kind",
            kind,
            "--init-method",
            f"file://{directory}/store",
        ]
        with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free, for TensorPipe
            env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
            )
            for rank in range(args.workers + 1)
        ]
        told, _ = processes[0].communicate(timeout=300)
        for process in processes[1:]:
            process.communicate(timeout=60)
        return float(json.loads(told.decode().splitlines()[-1]))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--init-method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind is not None:
        work(args.kind, args.rank, args)
        return
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            found[kind].append(measure(kind, args))
    ratios = [peer / ours for peer, ours in zip(found["tensorpipe"], found["broadcast"], strict=True)]
    print(f"{args.mib} MiB to {args.workers} workers, {'TCP' if args.tcp else 'same host'}, ms:")
    print(", ".join(f"{kind} {statistics.median(times):.2f}" for kind, times in found.items()))
    print(f"better: {statistics.median(ratios):.2f}x  ({' '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
