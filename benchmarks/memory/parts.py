"""What is measured: each part yields its figures."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.machine import ROOT
from benchmarks.meeting import at_broker, at_file
from benchmarks.memory.figure import Figure
from benchmarks.memory.group import Remote, WorkerError, group
from benchmarks.memory.worker import MB, busy_s, memory_of, num_shared, peak_of, reset_peak
from zrpc.transport.carrier import TRIM_S

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

IDLE_MAX_MB = 8
IDLE_MAX_SHARE = 0.001
FLIGHT_MAX_MB = 200
WINDOW_MB = (1 << 30) / MB
"""The default `max_in_flight_nbytes`."""
ROUNDING = 1.25
"""Shared memory is made in sizes at most a quarter larger than what they hold."""
SLACK_MB = 64
"""What allocators, thread stacks and ZeroMQ may take besides."""
GIVEN_BACK_S = 3 * TRIM_S + 1
"""Memory that was kept for use again is given back then, at both ends."""
BACK_MB = 64
"""How much more than at the start a worker may keep afterwards."""
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Without, glibc keeps freed blocks of up to 32 MB, as `zrpc.transport.chunks` has it do: dead tensors count."""
HUGE_NBYTES = int(2.2 * (1 << 30))
LINKS = {"same host": True, "tcp": False}
"""Name of the link: `shared_memory` of the options."""
INSIDE = "inside-shm"
"""The part that `shm` runs in a mount namespace."""


def idle(args: argparse.Namespace) -> Iterator[Figure]:
    """What a worker that does nothing takes beyond `import torch`."""
    bare = Remote()
    try:
        bare.ask("torch")
        with group(args.brokered) as workers:
            time.sleep(1)  # what follows the start has settled
            before = [busy_s(worker.pid) for worker in workers]
            time.sleep(args.idle_s)
            shares = [(busy_s(worker.pid) - old) / args.idle_s for worker, old in zip(workers, before, strict=True)]
            base = memory_of(bare.pid)
            for rank, worker in enumerate(workers):
                more = {key: value - base[key] for key, value in memory_of(worker.pid).items()}
                yield Figure(
                    f"idle worker {rank}, over `import torch` ({base['rss']:.0f} MB)",
                    f"RSS +{more['rss']:.1f} MB, of it its own {more['private']:.1f} MB",
                    f"≤ {IDLE_MAX_MB} MB",
                    more["rss"] <= IDLE_MAX_MB,
                )
    finally:
        bare.end()
    for rank, share in enumerate(shares):
        yield Figure(
            f"idle worker {rank}, of a core over {args.idle_s:g} s",
            f"{share:.3%}",
            f"< {IDLE_MAX_SHARE:.1%}",
            share < IDLE_MAX_SHARE,
        )


def flight(args: argparse.Namespace) -> Iterator[Figure]:
    """Small calls in flight: to a callee whose handler threads all stand still, and to one whose process does."""
    for stopped in (False, True):
        with group(args.brokered, num_worker_threads=4) as (caller, callee):
            caller.ask("warm_up", calls=2000)
            before = caller.ask("memory"), callee.ask("memory")
            if stopped:
                callee.process.send_signal(signal.SIGSTOP)
            sent_s, unanswered = caller.ask("launch", calls=args.calls)
            during = memory_of(caller.pid), memory_of(callee.pid)
            objects = caller.ask("objects") if args.objects else None
            if stopped:
                callee.process.send_signal(signal.SIGCONT)
            callee.ask("open_gate")
            done_s = caller.ask("collect")
            after = caller.ask("memory"), callee.ask("memory")
        more = [new["rss"] - old["rss"] for new, old in zip(during, before, strict=True)]
        left = [new["rss"] - old["rss"] for new, old in zip(after, before, strict=True)]
        yield Figure(
            f"{args.calls:,} calls to a callee whose {'process' if stopped else 'handler threads'} stood still",
            f"caller +{more[0]:.0f} MB ({more[0] * MB / args.calls:.0f} bytes a call), callee +{more[1]:.0f} MB; "
            f"{unanswered:,} in flight, sent in {sent_s:.1f} s, answered {done_s:.1f} s later",
            f"≤ {FLIGHT_MAX_MB} MB at the caller",
            more[0] <= FLIGHT_MAX_MB,
        )
        yield Figure(
            "the same, afterwards",
            f"caller +{left[0]:.0f} MB, callee +{left[1]:.0f} MB",
            f"≤ {BACK_MB} MB",
            max(left) <= BACK_MB,
        )
        if objects:
            print(f"  most objects, caller: {objects}")


def slow(args: argparse.Namespace) -> Iterator[Figure]:
    """Large calls to a callee that sleeps, until no more are let go; then it wakes up and serves them all."""
    links: list[tuple[str, bool, dict[str, str]]] = [(link, shared, {}) for link, shared in LINKS.items()]
    for link, shared, environment in [*links, (f"tcp, {'='.join(*NO_HEAP.items())}", False, NO_HEAP)]:
        with group(args.brokered, environment, shared_memory=shared) as pair:
            caller, callee = pair
            caller.ask("send", kind="tensor", nbytes=10_000_000)
            before = [worker.ask("memory")["rss"] for worker in pair]
            for worker in pair:
                reset_peak(worker.pid)
            caller.tell("flood", calls=args.large_calls, nbytes=10_000_000)
            settle(pair)
            waiting = [memory_of(worker.pid)["rss"] - old for worker, old in zip(pair, before, strict=True)]
            callee.ask("open_gate")
            all_s = caller.answer()
            peaks = [peak_of(worker.pid) - old for worker, old in zip(pair, before, strict=True)]
            time.sleep(GIVEN_BACK_S)
            after = [worker.ask("memory")["rss"] - old for worker, old in zip(pair, before, strict=True)]
        bound = WINDOW_MB * (ROUNDING if shared else 1) + SLACK_MB
        for who, held, peak in zip(("caller", "callee"), waiting, peaks, strict=True):
            yield Figure(
                f"{args.large_calls:,} calls of 10 MB to a callee that sleeps, {link}: {who}",
                f"+{held:.0f} MB while it sleeps, +{peak:.0f} MB at most",
                f"≤ {bound:.0f} MB (the window{', in sizes of shared memory' if shared else ''}, and {SLACK_MB} MB)",
                peak <= bound,
            )
        yield Figure(
            f"the same, {link}, {GIVEN_BACK_S:g} s afterwards",
            f"caller +{after[0]:.0f} MB, callee +{after[1]:.0f} MB; all answered after {all_s:.1f} s",
            f"≤ {BACK_MB} MB",
            max(after) <= BACK_MB,
        )


def settle(pair: tuple[Remote, Remote]) -> None:
    """Wait until neither worker takes a MB more than a second before."""
    old = [0.0, 0.0]
    while True:
        new = [memory_of(worker.pid)["rss"] for worker in pair]
        if all(now <= before + 1 for now, before in zip(new, old, strict=True)):
            return
        old = new
        time.sleep(1)


def huge(args: argparse.Namespace) -> Iterator[Figure]:
    """One value of more than 2 GiB, there and back."""
    size = HUGE_NBYTES / (1 << 30)
    for link, shared in LINKS.items():
        for kind in ("tensor", "bytes"):
            for command, way in (("send", "argument"), ("fetch", "result")):
                what = f"{size:.1f} GiB in one {'tensor' if kind == 'tensor' else '`bytes`'} as {way}, {link}"
                try:
                    with group(args.brokered, shared_memory=shared) as (caller, callee):
                        before = [memory_of(worker.pid)["rss"] for worker in (caller, callee)]
                        seconds = caller.ask(command, kind=kind, nbytes=HUGE_NBYTES)
                        peaks = [peak_of(worker.pid) for worker in (caller, callee)]
                except WorkerError as error:
                    yield Figure(what, str(error), "works", is_met=False)
                    continue
                more = [peak - old for peak, old in zip(peaks, before, strict=True)]
                yield Figure(
                    what, f"{seconds:.1f} s; caller +{more[0]:.0f} MB at most, callee +{more[1]:.0f} MB", "works", True
                )


def shm(args: argparse.Namespace) -> Iterator[Figure]:
    """Calls of 10 MB and of 200 MB where /dev/shm is of 64 MB, in a mount namespace of their own."""
    inside = f"mount -t tmpfs -o size=64m tmpfs /dev/shm && exec {sys.executable} -m benchmarks.memory {INSIDE}"
    command = ["unshare", "-m", "sh", "-c", inside + (" --brokered" if args.brokered else "")]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        done = subprocess.CompletedProcess(command, 1, "", f"unshare: {error}")
    what = "10 MB and 200 MB as argument and result where /dev/shm has 64 MB"
    said = (done.stdout + done.stderr).strip().replace("\n", "; ")
    if done.returncode and ("mount:" in said or "unshare:" in said):
        yield Figure(what, f"could not be shown here: {said}")
        return
    yield Figure(what, said, "works, or says what is missing", done.returncode == 0)


def inside_shm(args: argparse.Namespace) -> str:
    """What `shm` runs in that namespace."""
    with group(args.brokered) as pair:
        caller, _ = pair
        for nbytes in (10_000_000, 200_000_000):
            caller.ask("send", kind="tensor", nbytes=nbytes)
            caller.ask("fetch", kind="tensor", nbytes=nbytes)
        shared = [num_shared(worker.pid) for worker in pair]
        room = os.statvfs("/dev/shm")
    used = (room.f_blocks - room.f_bfree) * room.f_frsize
    return (
        f"works, {shared[0]} and {shared[1]} mappings of shared memory at caller and callee, "
        f"{used} bytes of /dev/shm's {room.f_blocks * room.f_frsize >> 20} MiB in use"
    )


def files(args: argparse.Namespace) -> Iterator[Figure]:
    """Many workers that may open few files, each of which calls all."""
    n, limit = args.workers, args.files
    for mode, meeting in (("brokerless", at_file), ("brokered", at_broker)):
        what = f"{n} workers, `ulimit -n {limit}`, each calls all, {mode}"
        with meeting() as method, contextlib.ExitStack() as stack:
            workers = [Remote(limit) for _ in range(n)]
            for worker in workers:
                stack.callback(worker.end)
            for rank, worker in enumerate(workers):
                worker.tell("init", rank=rank, method=method, world_size=n)
            try:
                for worker in workers:
                    worker.answer()
                for worker in workers:
                    worker.tell("call_all", world_size=n, nbytes=100_000)
                told = [worker.answer() for worker in workers]
                for worker in workers:
                    worker.tell("shutdown")
                for worker in workers:
                    worker.answer()
            except WorkerError as error:
                yield Figure(what, str(error), "works, or says what is missing", "ulimit -n" in str(error))
                continue
        answered = sum(one["answered"] for one in told)
        errors = sorted({one["error"] for one in told if one["error"]}, key=len)
        yield Figure(
            what,
            f"{answered} of {n * n} calls answered, {max(one['files'] for one in told)} files open at most"
            + (f"; the others: {errors[0]}" if errors else ""),
            "works, or says what is missing",
            all("ulimit -n" in error for error in errors),
        )


def rrefs(args: argparse.Namespace) -> Iterator[Figure]:
    """RRefs made by `remote`, one of each lot fetched, and dropped."""
    with group(args.brokered) as pair:
        user, _ = pair
        user.ask("make_rrefs", count=max(args.rrefs // 20, args.held), held=args.held)
        before = [worker.ask("memory")["rss"] for worker in pair]
        taken_s = user.ask("make_rrefs", count=args.rrefs, held=args.held)
        after = [worker.ask("memory")["rss"] for worker in pair]
    changes = [100 * (new / old - 1) for old, new in zip(before, after, strict=True)]
    yield Figure(
        f"{args.rrefs:,} RRefs made and dropped, {args.held} at a time, in {taken_s:.0f} s",
        f"user {changes[0]:+.1f} % RSS, owner {changes[1]:+.1f} %",
        "≤ 5 %",
        max(changes) <= 5,
    )


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "idle": idle, "flight": flight, "slow": slow, "huge": huge, "shm": shm, "files": files, "rrefs": rrefs
}  # fmt: skip
