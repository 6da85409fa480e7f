"""One of two workers of a round: `python -m benchmarks.cuda.worker PEER RANK PORT OUT ROWS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.rows import DEVICE, LOCAL, ROWS

TENSORPIPE, ZRPC, MACHINE = "torch", "zrpc", "machine"
NAMES = ("w0", "w1")
THREADS = 16


def modules_of(peer: str) -> tuple[Any, Any, Any]:
    """The modules of a framework for calls and for autograd, and its class of options."""
    if peer == TENSORPIPE:
        import torch.distributed.autograd as torch_autograd
        import torch.distributed.rpc as torch_rpc

        return torch_rpc, torch_autograd, torch_rpc.TensorPipeRpcBackendOptions
    import zrpc
    import zrpc.autograd

    return zrpc, zrpc.autograd, zrpc.RpcBackendOptions


def run_rows(peer: str, rank: int, port: int, rows: list[str]) -> dict[str, float]:
    """The rows, measured by rank 0; each worker's device is mapped to the other's of the same name."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rpc, autograd, make_options = modules_of(peer)
    options = make_options(num_worker_threads=THREADS, device_maps={name: {DEVICE: DEVICE} for name in NAMES})
    rpc.init_rpc(NAMES[rank], rank=rank, world_size=len(NAMES), rpc_backend_options=options)
    measured = {name: ROWS[name](rpc, autograd) for name in rows} if rank == 0 else {}
    rpc.shutdown()
    return measured


def main() -> None:
    """See the module."""
    peer, rank, port, out, rows = sys.argv[1:]
    torch.set_num_threads(1)
    if peer == MACHINE:
        measured = {name: LOCAL[name]() for name in LOCAL}
    else:
        measured = run_rows(peer, int(rank), int(port), [name for name in rows.split(",") if name])
    if int(rank) == 0:
        Path(out).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
