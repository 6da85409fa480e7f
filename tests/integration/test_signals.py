"""Signals and destructors in workers: Ctrl-C, handlers that call, threads that wait for one thing. Real processes.

ZRPC_INTERRUPTS=20000 pytest tests/integration/test_signals.py     the long run
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration.harness import WorkersFailedError
from tests.waiting import until
from zrpc import gather
from zrpc.agent.current import current_agent, is_agent_set
from zrpc.autograd import backward, context, get_gradients
from zrpc.errors import PeerLostError
from zrpc.rref.context import RRefContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

INTERRUPTS = int(os.environ.get("ZRPC_INTERRUPTS", "1500"))
WAIT_S = 30.0

_told = threading.Event()


def tell() -> None:
    _told.set()


def wait_told() -> bool:
    return _told.wait(WAIT_S)


def echo(x: Any) -> Any:
    return x


def echo_slowly(x: Any) -> Any:
    time.sleep(0.5)
    return x


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def call_back(to: str, x: Any) -> Any:
    return rpc.rpc_sync(to, echo, args=(x,))


def hold(x: Any) -> bool:
    _told.wait(WAIT_S)
    return x is not None


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def num_owned() -> int:
    return int(current_agent().extensions[RRefContext].debug_info()["num_owner_rrefs"])


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def send_soon(signum: int, after_s: float = 0.3, until_it_joins: bool = False) -> threading.Thread:
    """Send a signal to this process; `until_it_joins`: when it has threads of a worker that joins its group.

    Before, `init_rpc` imports modules. Python loses what a signal handler raises in a callback of a weak reference, and
    each import has one.
    """

    def send() -> None:
        if until_it_joins:
            until(lambda: any(one.name == "zrpc-control" for one in threading.enumerate()), "it joins", within_s=60)
        time.sleep(after_s)
        os.kill(os.getpid(), signum)

    return in_thread(send)


# ---- threads that wait for one thing --------------------------------------------------------------------------------


def share_a_future(rank: int, method: str) -> list[str] | None:
    options = rpc.RpcBackendOptions(init_method=method, rpc_timeout=0)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 1:
        wait_told()
        return None
    future = rpc.rpc_async("worker1", wait_told)
    ended: list[str] = []
    has_called = threading.Event()

    def wait(calls_first: bool) -> None:
        for _ in range(300 if calls_first else 0):  # callers in a row read for themselves: this one will
            rpc.rpc_sync("worker1", echo, args=(1,))
        has_called.set()
        try:
            future.wait()
        except PeerLostError as error:
            ended.append(type(error).__name__)

    threads = []
    for number in range(4):
        threads.append(in_thread(partial(wait, number == 0)))
        assert has_called.wait(WAIT_S)
        time.sleep(0.1)
    rpc.rpc_async("worker1", die)
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads), f"{ended} ended"
    rpc.shutdown(graceful=False)
    return ended


def test_all_threads_that_wait_for_one_future_learn_that_the_callee_died(cluster_in_each_mode: Cluster) -> None:
    """Whichever of them reads meanwhile."""
    with pytest.raises(WorkersFailedError) as caught:
        cluster_in_each_mode.run(share_a_future, 2, args=(cluster_in_each_mode.new_init_method(),), init=False)
    assert caught.value.outcomes[0].result == ["PeerLostError"] * 4


# ---- handlers that call ---------------------------------------------------------------------------------------------


def call_in_a_handler(rank: int) -> None:
    if rank == 1:
        return
    got: list[Any] = []

    def on_signal(*_: object) -> None:
        got.append(rpc.rpc_sync("worker1", call_back, args=("worker0", len(got))))
        got.append(rpc.remote("worker1", echo, args=("there",)).to_here())
        x = torch.ones(2, requires_grad=True)
        with context() as context_id:
            backward(context_id, [rpc.rpc_sync("worker1", double, args=(x,)).sum()])
            got.append(get_gradients(context_id)[x].tolist())

    signal.signal(signal.SIGUSR1, on_signal)
    ref = rpc.remote("worker1", echo_slowly, args=(3,))
    waits: list[Callable[[], Any]] = [
        lambda: rpc.rpc_sync("worker1", echo_slowly, args=(3,)),
        lambda: rpc.rpc_async("worker1", echo_slowly, args=(3,)).wait(),
        lambda: rpc.rpc_async("worker1", echo_slowly, args=(3,)).then(lambda done: done.wait()).wait(),
        ref.to_here,
        lambda: torch.futures.wait_all([rpc.rpc_async("worker1", echo_slowly, args=(3,))])[0],
    ]
    for wait in waits:
        sender = send_soon(signal.SIGUSR1, 0.1)
        assert wait() == 3
        sender.join()
        until(lambda: len(got) == 3, "the handler has run")
        assert got == [0, "there", [2.0, 2.0]]
        got.clear()


def test_a_signal_handler_may_call_while_its_thread_waits(cluster_in_each_mode: Cluster) -> None:
    """Whatever it waits for, and whatever the handler calls."""
    cluster_in_each_mode.run(call_in_a_handler, 2)


def be_called_in_a_handler(rank: int) -> None:
    if rank == 1:
        assert rpc.rpc_sync("worker0", wait_told)  # served while the handler there runs
        return

    def on_signal(*_: object) -> None:
        assert _told.wait(WAIT_S)

    signal.signal(signal.SIGUSR1, on_signal)
    sender = send_soon(signal.SIGUSR1, 0.1)
    rpc.rpc_async("worker1", call_back, args=("worker0", 1)).wait()
    future = rpc.rpc_async("worker1", tell_later)
    future.wait()
    sender.join()
    tell()


def tell_later() -> None:
    time.sleep(0.3)
    rpc.rpc_sync("worker0", tell)


def test_a_worker_is_served_while_a_signal_handler_runs(cluster: Cluster) -> None:
    """The handler waits for what another worker brings, on the thread that has read until then."""
    cluster.run(be_called_in_a_handler, 2)


def shut_down_in_a_handler(rank: int, method: str) -> None:
    rpc.init_rpc(
        f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(init_method=method)
    )

    def on_term(*_: object) -> None:
        rpc.shutdown()
        sys.exit(0)

    signal.signal(signal.SIGTERM, on_term)
    sender = send_soon(signal.SIGTERM, 0.5)
    try:
        while True:
            rpc.rpc_sync(f"worker{1 - rank}", echo_slowly, args=(1,))
    except SystemExit:
        assert not is_agent_set()
    sender.join()


def test_shutdown_in_a_sigterm_handler_ends_the_worker(cluster_in_each_mode: Cluster) -> None:
    """Both workers are told to end while they wait for each other."""
    cluster = cluster_in_each_mode
    cluster.run(shut_down_in_a_handler, 2, args=(cluster.new_init_method(),), init=False)


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


class WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        _told.wait(WAIT_S)
        return gradients[0]


def slow_backward(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = WaitsInBackward.apply(x)  # type: ignore[no-untyped-call]
    return result


def differentiate() -> None:
    x = torch.ones(2, requires_grad=True)
    with context() as context_id:
        backward(context_id, [rpc.rpc_sync("worker1", slow_backward, args=(x,)).sum()])


def be_interrupted(rank: int) -> None:
    if rank == 1:
        return
    ref = rpc.remote("worker1", wait_told)
    here = rpc.remote("worker0", wait_told)
    waits: dict[str, Callable[[], Any]] = {
        "rpc_sync": lambda: rpc.rpc_sync("worker1", wait_told),
        "wait": rpc.rpc_async("worker1", wait_told).wait,
        "wait for then": rpc.rpc_async("worker1", wait_told).then(lambda done: done.wait()).wait,
        "wait_all": lambda: torch.futures.wait_all([rpc.rpc_async("worker1", wait_told)]),
        "to_here": ref.to_here,
        "to_here on the owner": here.to_here,
        "a proxy": lambda: ref.rpc_sync().bit_length(),
        "barrier": lambda: gather.barrier({"worker0", "worker1"}),
        "backward": differentiate,
    }
    for name, wait in waits.items():
        sender = send_soon(signal.SIGINT)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert time.monotonic() - began < WAIT_S / 2, f"{name} was interrupted at once"
        sender.join()
        assert rpc.rpc_sync("worker1", call_back, args=("worker0", name)) == name, "it works as before"
    rpc.rpc_sync("worker1", tell)
    tell()
    assert ref.to_here()
    gather.barrier({"worker0"})
    x = torch.ones(2, requires_grad=True)
    with context() as context_id:
        backward(context_id, [rpc.rpc_sync("worker1", double, args=(x,)).sum()])
        assert get_gradients(context_id)[x].tolist() == [2.0, 2.0]


def test_ctrl_c_is_raised_wherever_a_program_waits(cluster_in_each_mode: Cluster) -> None:
    """At once, on whichever of the calls that wait, and calls in both directions work afterwards."""
    cluster_in_each_mode.run(be_interrupted, 2)


def be_interrupted_at_the_ends(rank: int, method: str, second: str) -> None:
    def init(to: str) -> None:
        options = rpc.RpcBackendOptions(init_method=to)
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)

    if rank == 0:
        sender = send_soon(signal.SIGINT, until_it_joins=True)
        with pytest.raises(KeyboardInterrupt):
            init(method)  # the other one does not come
        sender.join()
        assert not is_agent_set()
    init(second)
    if rank == 0:
        rpc.rpc_sync("worker1", echo, args=(1,))  # it is there
        sender = send_soon(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            rpc.shutdown()
        sender.join()
        assert not is_agent_set()
        return
    until(lambda: lost("worker0"), "the other one is gone")
    rpc.shutdown(graceful=False)


def lost(name: str) -> bool:
    try:
        rpc.rpc_sync(name, echo, args=(1,))
    except PeerLostError:
        return True
    return False


def test_ctrl_c_ends_init_rpc_and_shutdown(cluster_in_each_mode: Cluster) -> None:
    """The process is no worker afterwards."""
    cluster = cluster_in_each_mode
    cluster.run(be_interrupted_at_the_ends, 2, args=(cluster.new_init_method(), cluster.new_init_method()), init=False)


def be_interrupted_often(rank: int) -> None:
    if rank == 1:
        return

    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, strike)
    chance = random.Random(7)
    x = torch.arange(4.0, requires_grad=True)
    large = torch.ones(50_000)

    def differentiated(number: int) -> int:
        with context() as context_id:
            backward(context_id, [rpc.rpc_sync("worker1", double, args=(x * number,)).sum()])
            return int(get_gradients(context_id)[x][0]) // 2

    kinds: list[Callable[[int], Any]] = [
        lambda number: rpc.rpc_sync("worker1", echo, args=(number,)),
        lambda number: rpc.rpc_sync("worker1", echo, args=(number,)),
        lambda number: rpc.rpc_async("worker1", echo, args=(number,)).wait(),
        lambda number: rpc.remote("worker1", echo, args=(number,)).to_here(),
        lambda number: rpc.rpc_sync("worker1", call_back, args=("worker0", number)),
        lambda number: rpc.rpc_sync("worker1", torch.add, args=(torch.tensor(number), 0)).item(),
        lambda number: rpc.rpc_sync("worker1", echo, args=(large,)).numel() - 50_000 + number,
        partial(hold_there, rpc.RRef(large)),
        differentiated,
    ]
    struck = number = 0
    while struck < INTERRUPTS:
        rearm_at = 0.0
        try:
            while True:
                if time.monotonic() > rearm_at:  # one in a user's destructor would be lost
                    rearm_at = time.monotonic() + 1.0
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(2e-5, 2e-3))
                number += 1
                assert kinds[number % len(kinds)](number) == number
        except KeyboardInterrupt:
            struck += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    for kind in kinds:
        number += 1
        assert kind(number) == number
    kinds.clear()
    del kind
    gc.collect()
    until(lambda: num_owned() == 0, "no reference is left here")
    until(lambda: rpc.rpc_sync("worker1", num_owned) == 0, "nor there")


def hold_there(ref: rpc.RRef[Any], number: int) -> Any:
    rpc.rpc_sync("worker1", fetch, args=(ref,))
    return number if rpc.rpc_sync("worker1", echo, args=(ref,)).is_owner() else None


def fetch(ref: rpc.RRef[Any]) -> None:
    assert ref.to_here().numel()


def test_interrupts_at_random_moments_leave_a_worker_as_good_as_before(cluster_in_each_mode: Cluster) -> None:
    """Every later call works, no reference is lost, and the shutdown waits for nothing."""
    cluster_in_each_mode.run(be_interrupted_often, 2, timeout_s=60 + INTERRUPTS / 50)


# ---- destructors ----------------------------------------------------------------------------------------------------


class Caller:
    """Makes a call when it is freed."""

    ended = 0

    def __init__(self) -> None:
        self.me: Caller | None = self

    def __del__(self) -> None:
        other = f"worker{1 - rpc.get_worker_info().id}"
        assert rpc.rpc_sync(other, echo, args=(5,)) == 5
        Caller.ended += 1


def collect() -> int:
    """A function frees one that is in a cycle."""
    Caller()
    gc.collect()
    return Caller.ended


def call_in_destructors(rank: int) -> None:
    if rank == 1:
        return
    gc.disable()
    for number in range(1, 20):
        made = Caller()
        made.me = None
        del made
        assert Caller.ended == number
        assert rpc.rpc_sync("worker1", collect) == number
        assert rpc.rpc_async("worker1", echo, args=(number,)).then(lambda done: done.wait()).wait() == number
    gc.enable()


def test_destructors_may_call(cluster: Cluster) -> None:
    """On the thread of a program, and on one that serves its call."""
    cluster.run(call_in_destructors, 2)
