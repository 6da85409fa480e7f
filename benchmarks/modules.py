"""Which modules of zrpc one `rpc_sync` enters, at the caller and at the callee, and how often.

    python -m benchmarks.modules                 a call of a function with nothing, between two workers of one host
    python -m benchmarks.modules --tcp           without shared memory and without sockets of the host
    python -m benchmarks.modules --tensor        with a tensor of four numbers

A call enters a module where a function of that module is called from another one. The figures are the least of many
calls, each traced by itself: so what readers do between two calls, and polling, count as little as they can. A traced
call is slow, and no figure of time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zrpc as rpc

if TYPE_CHECKING:
    from types import FrameType

ROOT = str(Path(rpc.__file__).parent)
CALLS, WARM = 60, 200

_entered: Counter[str] = Counter()
_is_tracing = False


def _module_of(frame: FrameType | None) -> str | None:
    """The module of zrpc that a frame is in."""
    path = frame.f_code.co_filename if frame is not None else ""
    return path.removeprefix(ROOT)[1:].removesuffix(".py").replace("/", ".") if path.startswith(ROOT) else None


def _trace(frame: FrameType, event: str, _: object) -> None:
    if _is_tracing and event == "call":
        module = _module_of(frame)
        if module is not None and module != _module_of(frame.f_back):
            _entered[module] += 1


def noop() -> None:
    """What is called."""


def echo(value: Any) -> Any:
    """What is called with a tensor."""
    return value


def begin() -> None:
    """Count from now on."""
    global _is_tracing
    _entered.clear()
    _is_tracing = True


def end() -> dict[str, int]:
    """Count no more; how often each module was entered."""
    global _is_tracing
    _is_tracing = False
    return dict(_entered)


def work(rank: int, method: str, args: argparse.Namespace) -> None:
    """The whole life of one worker."""
    threading.setprofile(_trace)
    sys.setprofile(_trace)
    options = rpc.RpcBackendOptions(init_method=method, shared_memory=not args.tcp)
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        import torch

        call: tuple[Any, tuple[Any, ...]] = (echo, (torch.ones(4),)) if args.tensor else (noop, ())
        for _ in range(WARM):
            rpc.rpc_sync("w1", call[0], args=call[1])
        least: dict[str, dict[str, int]] = {}
        for _ in range(CALLS):
            rpc.rpc_sync("w1", begin)
            begin()
            rpc.rpc_sync("w1", call[0], args=call[1])
            seen = {"caller": end(), "callee": rpc.rpc_sync("w1", end)}
            for side, counts in seen.items():
                if side not in least or sum(counts.values()) < sum(least[side].values()):
                    least[side] = counts
        _print(least)
    rpc.shutdown()


def _print(least: dict[str, dict[str, int]]) -> None:
    names = sorted({name for counts in least.values() for name in counts})
    print(f"{'module':32} caller callee")
    for name in names:
        print(f"{name:32} {least['caller'].get(name, 0):6} {least['callee'].get(name, 0):6}")
    entered = [sum(counts.values()) for counts in least.values()]
    print(f"{len(names)} modules; entered {entered[0]} times at the caller and {entered[1]} times at the callee")


def main() -> None:
    """Trace, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--tensor", action="store_true")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        method = f"file://{directory}/store"
        workers = [context.Process(target=work, args=(rank, method, args)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)


if __name__ == "__main__":
    main()
