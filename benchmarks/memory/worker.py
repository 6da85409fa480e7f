"""A worker process: reads a command a line, writes an answer a line.

Memory is in MB (10^6 bytes). `rss` is what of a process lies in memory; `private` is what of it no other process
shares, that is without shared memory and the code of libraries.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

MB = 1e6
Figures = dict[str, float]


def memory_of(pid: int) -> Figures:
    """`rss` and `private` of a process."""
    found: Figures = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, kb = line.split()[:2]
        found[key.rstrip(":")] = int(kb) * 1024 / MB
    return {"rss": found["Rss"], "private": found["Private_Dirty"] + found["Private_Clean"]}


def reset_peak(pid: int) -> None:
    """Let `peak_of` count from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_of(pid: int) -> float:
    """The most `rss` that a process has had since `reset_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / MB


def busy_s(pid: int) -> float:
    """How long the threads of a process have run on a processor, in seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def num_shared(pid: int) -> int:
    """How many pieces of anonymous shared memory a process has mapped."""
    return sum("memfd:" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


# ---- what is called -------------------------------------------------------------------------------------------------

_gate = threading.Event()


def noop() -> None:
    """Nothing."""


def stand_still(_: object = None) -> None:
    """Occupy a handler thread until this worker's main thread opens the gate."""
    _gate.wait()


def ends_of(value: Any) -> tuple[int, int, int]:
    """Length, first and last byte of a tensor of bytes or of `bytes`."""
    return len(value), int(value[0]), int(value[-1])


def make(kind: str, nbytes: int) -> Any:
    """A tensor of bytes, or `bytes`, with a 1 at either end."""
    if kind == "bytes":
        return b"\1" + bytes(nbytes - 2) + b"\1"
    import torch

    tensor = torch.zeros(nbytes, dtype=torch.uint8)
    tensor[0] = tensor[-1] = 1
    return tensor


def kept_rrefs() -> int:
    """How many RRefs this worker keeps for others."""
    from zrpc.agent.current import current_agent
    from zrpc.rref.context import RRefContext

    return int(current_agent().extensions[RRefContext].debug_info()["num_owner_rrefs"])


# ---- commands -------------------------------------------------------------------------------------------------------


class Worker:
    """What a worker process does when it is told to, one method a command."""

    def torch(self) -> None:
        """Only `import torch`."""
        import torch

        torch.set_num_threads(1)

    def init(self, rank: int, method: str, world_size: int = 2, **options: Any) -> None:
        """`import torch` and `init_rpc`."""
        self.torch()
        import zrpc as rpc

        self.rpc = rpc
        made = rpc.RpcBackendOptions(init_method=method, rpc_timeout=0, **options)
        rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=made)

    def shutdown(self) -> None:
        """`shutdown`, with all others."""
        self.rpc.shutdown()

    def memory(self) -> Figures:
        """What this process takes once garbage is gone and the C allocator has given back what it can."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return memory_of(os.getpid())

    def objects(self) -> dict[str, int]:
        """How many objects there are of the classes that there are most of."""
        counts: dict[str, int] = {}
        for entry in gc.get_objects():
            name = type(entry).__qualname__
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1])[:12])

    def open_gate(self) -> None:
        """Let go on whatever stands still here."""
        _gate.set()

    # calls in flight

    def warm_up(self, calls: int) -> None:
        """Make calls, so that pools and tables have the size that such calls need."""
        for future in [self.rpc.rpc_async("w1", noop) for _ in range(calls)]:
            future.wait()

    def launch(self, calls: int) -> list[float]:
        """Make small calls that stand still and keep their futures; seconds, and how many are not answered."""
        begun = time.perf_counter()
        self.futures = [self.rpc.rpc_async("w1", stand_still) for _ in range(calls)]
        seconds = time.perf_counter() - begun
        return [seconds, sum(not future.done() for future in self.futures)]

    def collect(self) -> float:
        """Wait for all of them; seconds."""
        begun = time.perf_counter()
        for future in self.futures:
            future.wait()
        del self.futures
        return time.perf_counter() - begun

    # RRefs

    def make_rrefs(self, count: int, held: int) -> float:
        """Make and drop `count` RRefs, `held` at a time, and wait until the owner keeps none."""
        begun = time.perf_counter()
        for first in range(0, count, held):
            made = [self.rpc.remote("w1", noop) for _ in range(min(held, count - first))]
            made[-1].to_here()
            del made
        while self.rpc.rpc_sync("w1", kept_rrefs):
            time.sleep(0.01)
        return time.perf_counter() - begun

    # large values

    def flood(self, calls: int, nbytes: int) -> float:
        """Call the callee, which stands still, with a fresh tensor each time, as fast as can be; seconds."""
        begun = time.perf_counter()
        futures = [self.rpc.rpc_async("w1", stand_still, args=(make("tensor", nbytes),)) for _ in range(calls)]
        for future in futures:
            future.wait()
        return time.perf_counter() - begun

    def send(self, kind: str, nbytes: int) -> float:
        """Call with one large value; seconds of the call."""
        value = make(kind, nbytes)
        begun = time.perf_counter()
        got = self.rpc.rpc_sync("w1", ends_of, args=(value,))
        if tuple(got) != (nbytes, 1, 1):
            raise ValueError(f"{got} arrived of {nbytes} bytes")
        return time.perf_counter() - begun

    def fetch(self, kind: str, nbytes: int) -> float:
        """Get one large value for an answer; seconds of the call."""
        begun = time.perf_counter()
        got = ends_of(self.rpc.rpc_sync("w1", make, args=(kind, nbytes)))
        if got != (nbytes, 1, 1):
            raise ValueError(f"{got} arrived of {nbytes} bytes")
        return time.perf_counter() - begun

    # many workers

    def call_all(self, world_size: int, nbytes: int) -> dict[str, Any]:
        """Call each worker, this one too, with a tensor: how many answered, the first error, and files open here."""
        answered, error = 0, ""
        for rank in range(world_size):
            try:
                self.send_to(rank, nbytes)
                answered += 1
            except Exception as raised:
                error = error or f"{type(raised).__name__}: {raised}"
        return {"answered": answered, "error": error, "files": len(os.listdir("/proc/self/fd")) - 1}

    def send_to(self, rank: int, nbytes: int) -> None:
        """One call with a tensor."""
        self.rpc.rpc_sync(f"w{rank}", ends_of, args=(make("tensor", nbytes),), timeout=60)


def work() -> None:
    """Be a worker until there are no more commands."""
    worker = Worker()
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = {"answer": getattr(worker, command)(**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    work()
