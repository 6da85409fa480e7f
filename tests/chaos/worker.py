"""One worker: calls, references, gradients and broadcasts to all others, until it is told to stop."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import os
import random
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import zrpc as rpc
from tests import leaks
from tests.chaos.journal import UNSENT, Journal
from tests.chaos.lossy import make_lossy
from tests.kept import kept
from tests.waiting import until
from zrpc import autograd as dist_autograd
from zrpc.agent.current import current_agent
from zrpc.errors import DrainingError, NotConnectedError, ZrpcError

if TYPE_CHECKING:
    from collections.abc import Callable

START_S = 60.0
"""What coming in may take: a broker that comes again waits for all that it had."""
TIMEOUT_S = 5.0
END_S = 30.0
"""What a thread may take to end once it is told to: its call's time limit, nested ones, and a busy machine."""
SETTLE_S = 30.0
PAUSE_S = 0.02
SIZES = (1, 1_000, 100_000, 1_000_000)
"""Of tensors, in elements of one byte."""

journal: Journal
me: str
peers: list[str]
_stop = threading.Event()


# ---- what is called ------------------------------------------------------------------------------------------------


def run(call: str, payload: torch.Tensor) -> int:
    journal.write("ran", call, me)
    return payload.numel()


def run_nested(call: str, payload: torch.Tensor, through: str) -> int:
    """Serve a call, and make one of it."""
    journal.write("ran", call, me)
    return make(f"{call}+", through, payload)


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def double_elsewhere(x: torch.Tensor, peer: str) -> torch.Tensor:
    return rpc.rpc_sync(peer, double, args=(x,))


def total(rref: rpc.RRef[torch.Tensor]) -> float:
    return float(rref.to_here().sum())


# ---- the load ------------------------------------------------------------------------------------------------------


def make(call: str, peer: str, payload: torch.Tensor, *, nested: str | None = None) -> int:
    """Make a call, and write down what became of it."""
    journal.write("made", call, peer)
    try:
        args: tuple[Any, ...] = (call, payload) if nested is None else (call, payload, nested)
        answer = rpc.rpc_sync(peer, run if nested is None else run_nested, args=args)
    except Exception as error:
        fail(call, peer, error)
        raise
    journal.write("answered", call, peer)
    if answer != payload.numel():
        journal.write("wrong", f"{call}: {answer} came for {payload.numel()}")
    return answer


def fail(call: str, peer: str, error: BaseException) -> None:
    certain = isinstance(error, NotConnectedError | DrainingError) or "was not sent" in str(error)
    journal.write("failed", call, peer, type(error).__name__, *([UNSENT] if certain else []))


def calls(rng: random.Random, new_id: Callable[[], str]) -> None:
    payload = torch.ones(rng.choice(SIZES), dtype=torch.uint8)
    nested = rng.choice(peers) if rng.random() < 0.2 else None
    make(new_id(), rng.choice(peers), payload, nested=nested)


def many_calls(rng: random.Random, new_id: Callable[[], str]) -> None:
    """Several under way at once, to one or to all."""
    payload = torch.ones(rng.choice(SIZES), dtype=torch.uint8)
    call = new_id()
    names = list(peers) if rng.random() < 0.5 else [rng.choice(peers)] * 8
    ids = [f"{call}.{number}" for number in range(len(names))] if len(set(names)) < len(names) else [call] * len(names)
    for one, name in zip(ids, names, strict=True):
        journal.write("made", one, name)
    try:
        if ids[0] == call:
            futures: list[Any] = list(rpc.broadcast(names, run, args=(call, payload)))
        else:
            futures = [rpc.rpc_async(n, run, args=(i, payload)) for i, n in zip(ids, names, strict=True)]
    except Exception as error:
        for one, name in zip(ids, names, strict=True):
            journal.write("failed", one, name, type(error).__name__)
        raise
    for one, name, future in zip(ids, names, futures, strict=True):
        try:
            future.wait()
        except Exception as error:
            fail(one, name, error)
        else:
            journal.write("answered", one, name)


def cancelled(rng: random.Random, new_id: Callable[[], str]) -> None:
    """A call that is called off, at once or a little later. It may have run, and even be answered."""
    call, peer = new_id(), rng.choice(peers)
    journal.write("made", call, peer)
    try:
        future: Any = rpc.rpc_async(peer, run_nested, args=(call, torch.ones(1000), rng.choice(peers)))
        _stop.wait(rng.choice((0.0, 0.001, 0.01)))
        future.cancel()
        future.wait()
    except Exception as error:
        fail(call, peer, error)
        raise
    journal.write("answered", call, peer)


def references(rng: random.Random, new_id: Callable[[], str]) -> None:
    size = rng.choice(SIZES[1:3])
    made = rpc.remote(rng.choice(peers), torch.ones, args=(size,))
    found = rpc.rpc_sync(rng.choice(peers), total, args=(made,)), float(made.to_here().sum())
    if found != (size, size):
        journal.write("wrong", f"{new_id()}: a reference to {size} ones gave {found}")


def gradients(rng: random.Random, new_id: Callable[[], str]) -> None:
    x = torch.ones(rng.choice(SIZES[:2]), requires_grad=True)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync(rng.choice(peers), double_elsewhere, args=(x, rng.choice(peers)))
        dist_autograd.backward(context_id, [y.sum()], mode=rng.choice(["fast", "smart"]))
        got = dist_autograd.get_gradients(context_id)[x]
    if not torch.equal(got, torch.full_like(x, 2.0)):
        journal.write("wrong", f"{new_id()}: the gradient is {got}")


WORK = (calls, many_calls, cancelled, references, gradients)


def load(seed: int, number: int) -> None:
    """One thread of it."""
    rng = random.Random(f"{seed} {os.getpid()} {number}")
    numbers = itertools.count()
    prefix = f"{me}.{os.getpid()}.{number}"
    while not _stop.is_set():
        work = rng.choice(WORK)
        try:
            work(rng, lambda: f"{prefix}.{next(numbers)}")
        except (RuntimeError, ZrpcError) as error:
            journal.write("failed", f"{prefix}.{work.__name__}", "-", type(error).__name__)
            _stop.wait(PAUSE_S)  # whoever is gone is not called as fast as can be
        except Exception:
            journal.write("wrong", " | ".join(traceback.format_exc().splitlines()[-3:]))
        gc.collect(0)


# ---- the end -------------------------------------------------------------------------------------------------------


def end(folder: Path, threads: list[threading.Thread], report: dict[str, Any]) -> None:
    """All that was made comes to its end, and nothing is kept once all have come to theirs."""
    _stop.set()
    deadline = time.monotonic() + END_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    report["hanging"] = [thread.name for thread in threads if thread.is_alive()]
    if report["hanging"]:
        with (folder / f"{me}.stacks").open("w") as file:
            faulthandler.dump_traceback(file)
    (folder / f"{me}.ended").touch()
    until(lambda: len(list(folder.glob("*.ended"))) > len(peers), "all have ended", within_s=2 * END_S)

    def is_clean() -> bool:
        gc.collect()
        return not kept()

    try:
        until(is_clean, "nothing is kept", within_s=SETTLE_S)
    except AssertionError:
        report["leaked"] = kept()
    (folder / f"{me}.clean").touch()
    until(lambda: len(list(folder.glob("*.clean"))) > len(peers), "all are clean", within_s=2 * SETTLE_S)


def main() -> None:
    """The whole life of a worker."""
    global journal, me, peers
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--peers", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--init-method", required=True)
    parser.add_argument("--bind", default=rpc.RpcBackendOptions.DEFAULT_BIND)
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lossy", type=float, default=0.0)
    args = parser.parse_args()
    faulthandler.enable()
    me, peers, journal = args.name, args.peers.split(","), Journal(args.folder, args.name)
    make_lossy(args.lossy, random.Random(f"{args.seed} {os.getpid()}"))
    leaks.start_frame_collector()
    report: dict[str, Any] = {"pid": os.getpid()}
    options = rpc.RpcBackendOptions(
        init_method=args.init_method, rpc_timeout=START_S, shared_memory=not args.tcp, bind=args.bind
    )
    try:
        with leaks.nothing_left(settle_s=SETTLE_S):
            rank = int(me.removeprefix("w"))
            rpc.init_rpc(me, rank=rank, world_size=None, rpc_backend_options=options)
            current_agent().set_rpc_timeout(TIMEOUT_S)
            (args.folder / f"{me}.{os.getpid()}.here").touch()
            threads = [
                threading.Thread(target=load, args=(args.seed, number), name=f"load-{number}", daemon=True)
                for number in range(args.threads)
            ]
            for thread in threads:
                thread.start()
            while not (args.folder / "stop").exists():
                time.sleep(0.1)
            end(args.folder, threads, report)
            began = time.monotonic()
            rpc.shutdown()
            report["shutdown_s"] = time.monotonic() - began
    except BaseException as error:
        report["error"] = "".join(traceback.format_exception(error))[-3000:]
    (args.folder / f"{me}.report").write_text(json.dumps(report))
    sys.exit("error" in report)


if __name__ == "__main__":
    import tests.chaos.worker  # what is called belongs to a module of that name, in every worker

    tests.chaos.worker.main()
