"""What zrpc takes of memory: idle, with many calls in flight, after many RRefs, and before a callee that is too slow.

    python -m benchmarks.memory                          everything, about 12 minutes on 2 cores
    python -m benchmarks.memory idle flight              some of it
    python -m benchmarks.memory rrefs --rrefs 50000      less of it
    python -m benchmarks.memory --brokered               through a broker

Every worker is a process of its own, made from nothing. `RSS` is what of a process lies in memory; `private` is what of
it no other process shares, that is RSS without the code of libraries. A figure called "after" is taken once the garbage
collector has run and the C allocator has given back what it can (`malloc_trim`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import ROOT, facts, record
from benchmarks.meeting import at_broker, at_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

MB = 1e6
Figures = dict[str, float]

BARE = "import torch; print('ready', flush=True); input()"
IDLE = """
import torch, zrpc as rpc
options = rpc.RpcBackendOptions(init_method={method!r})
rpc.init_rpc("w{rank}", rank={rank}, world_size=2, rpc_backend_options=options)
print("ready", flush=True)
input()
rpc.shutdown()
"""


# ---- on a worker ----------------------------------------------------------------------------------------------------


def memory_of(pid: int) -> Figures:
    """RSS and private memory of a process, in MB."""
    found: Figures = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, kb = line.split()[:2]
        found[key.rstrip(":")] = int(kb) * 1024 / MB
    return {"rss": found["Rss"], "private": found["Private_Dirty"] + found["Private_Clean"]}


def noop() -> None:
    return None


def sink(_: object) -> None:
    return None


_gate = threading.Event()
_running = threading.Semaphore(0)


def stand_still() -> None:
    """Occupy a handler thread until this worker's main thread opens the gate."""
    _running.release()
    _gate.wait()


def slow_sink(_: object, seconds: float) -> None:
    time.sleep(seconds)


class Worker:
    """What a worker process does when it is told to, one method a command."""

    def init(self, rank: int, method: str, **options: Any) -> None:
        import zrpc as rpc

        self.rpc = rpc
        made = rpc.RpcBackendOptions(init_method=method, rpc_timeout=0, **options)
        rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=made)

    def shutdown(self) -> None:
        self.rpc.shutdown()

    def memory(self, trim: bool = True) -> Figures:
        if trim:
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

    # calls in flight

    def warm_up(self, calls: int) -> None:
        for future in [self.rpc.rpc_async("w1", noop) for _ in range(calls)]:
            future.wait()

    def occupy(self, threads: int) -> None:
        """Have every handler thread of the callee stand still."""
        self.occupied = [self.rpc.rpc_async("w1", stand_still) for _ in range(threads)]

    def wait_occupied(self, threads: int) -> None:
        for _ in range(threads):
            _running.acquire()

    def open_gate(self) -> None:
        _gate.set()

    def launch(self, calls: int) -> float:
        begun = time.perf_counter()
        self.futures = [self.rpc.rpc_async("w1", noop) for _ in range(calls)]
        return time.perf_counter() - begun

    def collect(self) -> float:
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

    # a slow callee

    def flood(self, calls: int, nbytes: int, seconds: float) -> Figures:
        """Call a slow function with fresh tensors as fast as can be; the most memory that it took, in MB."""
        import torch

        before = self.memory()
        peak = Peak()
        begun = time.perf_counter()
        futures = [
            self.rpc.rpc_async("w1", slow_sink, args=(torch.ones(nbytes, dtype=torch.uint8), seconds))
            for _ in range(calls)
        ]
        sent_s = time.perf_counter() - begun
        for future in futures:
            future.wait()
        return {
            "before": before["rss"], "peak": peak.stop(), "sent_s": sent_s, "all_s": time.perf_counter() - begun
        }  # fmt: skip


def kept_rrefs() -> int:
    from zrpc.agent.current import current_agent
    from zrpc.rref.context import RRefContext

    return int(current_agent().extensions[RRefContext].debug_info()["num_owner_rrefs"])


class Peak:
    """Watches this process's RSS from a thread of its own."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._most = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGESIZE") / MB
        statm = Path("/proc/self/statm")
        while not self._over.wait(0.01):
            self._most = max(self._most, int(statm.read_text().split()[1]) * page)

    def stop(self) -> float:
        """The most that was seen, in MB."""
        self._over.set()
        self._thread.join()
        return self._most


def work() -> None:
    """Be a worker: a command a line, an answer a line."""
    worker = Worker()
    for line in sys.stdin:
        command, arguments = json.loads(line)
        answer = getattr(worker, command)(**arguments)
        print(json.dumps(answer), flush=True)


# ---- where they are told what to do ---------------------------------------------------------------------------------


class Remote:
    """A worker process and the way to tell it something."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-m", "benchmarks.memory", "--work"], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def tell(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died: its traceback is above")
        return json.loads(line)

    def ask(self, command: str, **arguments: Any) -> Any:
        self.tell(command, **arguments)
        return self.answer()


def meeting_point(brokered: bool) -> AbstractContextManager[str]:
    """Where two workers find each other."""
    return at_broker() if brokered else at_file()


@contextlib.contextmanager
def group(brokered: bool, **options: Any) -> Iterator[tuple[Remote, Remote]]:
    """Two workers: the caller `w0` and the callee `w1`."""
    with meeting_point(brokered) as method:
        workers = Remote(), Remote()
        try:
            for rank, worker in enumerate(workers):
                worker.tell("init", rank=rank, method=method, **options)
            for worker in workers:
                worker.answer()
            yield workers
            for worker in workers:
                worker.tell("shutdown")
            for worker in workers:
                worker.answer()
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.communicate()


def idle(args: argparse.Namespace) -> Iterator[str]:
    """What a worker that does nothing takes beyond `import torch`."""
    with meeting_point(args.brokered) as method:
        scripts = [BARE, *(IDLE.format(method=method, rank=rank) for rank in (0, 1))]
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) for script in scripts
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        bare, *workers = [memory_of(process.pid) for process in processes]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            process.communicate()
    more = {key: max(worker[key] for worker in workers) - bare[key] for key in bare}
    yield (
        f"an idle worker, over the {bare['rss']:.0f} MB of bare `import torch`: "
        f"RSS +{more['rss']:.1f} MB, private +{more['private']:.1f} MB"
    )


def flight(args: argparse.Namespace) -> Iterator[str]:
    """Calls in flight: to a callee whose handler threads all stand still, and to one whose process does."""
    for stopped in (False, True):
        with group(args.brokered, num_worker_threads=4) as (caller, callee):
            caller.ask("warm_up", calls=2000)
            before = caller.ask("memory")
            callee_before = callee.ask("memory")
            if stopped:
                callee.process.send_signal(signal.SIGSTOP)
            else:
                caller.ask("occupy", threads=4)
                callee.ask("wait_occupied", threads=4)
            sent_s = caller.ask("launch", calls=args.calls)
            during = caller.ask("memory", trim=False)
            callee_during = memory_of(callee.process.pid)
            objects = caller.ask("objects") if args.objects else None
            callee_objects = callee.ask("objects") if args.objects and not stopped else None
            if stopped:
                callee.process.send_signal(signal.SIGCONT)
            else:
                callee.ask("open_gate")
            done_s = caller.ask("collect")
            after = caller.ask("memory")
            callee_after = callee.ask("memory")
        yield (
            f"{args.calls} calls to a callee whose {'process' if stopped else 'handler threads'} stood still: "
            f"caller +{during['rss'] - before['rss']:.0f} MB "
            f"({(during['rss'] - before['rss']) * MB / args.calls:.0f} bytes a call), "
            f"afterwards +{after['rss'] - before['rss']:.0f} MB; "
            f"callee +{callee_during['rss'] - callee_before['rss']:.0f} MB, "
            f"afterwards +{callee_after['rss'] - callee_before['rss']:.0f} MB; "
            f"sent in {sent_s:.1f} s, answered {done_s:.1f} s later"
        )
        if objects:
            yield f"  most objects, caller: {objects}"
        if callee_objects:
            yield f"  most objects, callee: {callee_objects}"


def rrefs(args: argparse.Namespace) -> Iterator[str]:
    """RRefs made by `remote`, one of each lot fetched, and dropped."""
    with group(args.brokered) as (user, owner):
        user.ask("make_rrefs", count=args.rrefs // 20, held=args.held)
        before = user.ask("memory"), owner.ask("memory")
        taken_s = user.ask("make_rrefs", count=args.rrefs, held=args.held)
        after = user.ask("memory"), owner.ask("memory")
        objects = [worker.ask("objects") for worker in (user, owner)] if args.objects else []
    changes = [100 * (new["rss"] / old["rss"] - 1) for old, new in zip(before, after, strict=True)]
    yield (
        f"{args.rrefs} RRefs made and dropped, {args.held} at a time, in {taken_s:.0f} s: "
        f"user {changes[0]:+.1f}% RSS, owner {changes[1]:+.1f}%"
    )
    for found in objects:
        yield f"  most objects: {found}"


def flood(args: argparse.Namespace) -> Iterator[str]:
    """A caller that makes calls of 1 MB without end, and a callee that takes 10 ms for each, one at a time."""
    for limit in (0, args.window << 20, None):
        chosen = {} if limit is None else {"max_in_flight_nbytes": limit}
        for shared in (True, False):
            with group(args.brokered, num_worker_threads=1, shared_memory=shared, **chosen) as (caller, _):
                seen = caller.ask("flood", calls=args.flood_mb, nbytes=1_000_000, seconds=0.01)
            window = (
                "the default window" if limit is None else f"a window of {limit >> 20} MiB" if limit else "no window"
            )
            yield (
                f"{args.flood_mb} calls of 1 MB, {window}, {'shared memory' if shared else 'sockets'}: "
                f"caller +{seen['peak'] - seen['before']:.0f} MB at most; "
                f"sent in {seen['sent_s']:.1f} s, answered after {seen['all_s']:.1f} s"
            )


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "idle": idle, "flight": flight, "rrefs": rrefs, "flood": flood
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--brokered", action="store_true", help="workers reach each other through a broker")
    parser.add_argument("--calls", type=int, default=100_000, help="calls in flight")
    parser.add_argument("--rrefs", type=int, default=1_000_000, help="RRefs made and dropped")
    parser.add_argument("--held", type=int, default=100, help="of them held at a time")
    parser.add_argument("--flood-mb", type=int, default=3000, help="calls of 1 MB made to a slow callee")
    parser.add_argument("--window", type=int, default=64, help="MiB in flight in one of the floods")
    parser.add_argument("--objects", action="store_true", help="say of what classes there are most objects")
    parser.add_argument("--out", type=Path, help="where the figures are written, as memory.md")
    args = parser.parse_args()
    if args.work:
        work()
        return
    lines = []
    for name in args.parts or PARTS:
        for line in PARTS[name](args):
            print(line, flush=True)
            lines.append(line)
    if args.out is not None:
        items = [f"  - {line.strip()}" if line.startswith(" ") else f"- {line}" for line in lines]
        record("\n".join([f"{facts()}.", "", *items, ""]), args.out, "memory.md")


if __name__ == "__main__":
    main()
