"""A worker of a dynamic group leaves and comes again under its name and rank: it is a new one, with all its rights."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
import zrpc.autograd as dist_autograd
from tests.integration.harness import is_member
from tests.waiting import until
from zrpc.errors import StaleWorkerError
from zrpc.gather import all_gather

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LIVES = 4
CALLS = 60
"""With so many small messages workers of one host pass a broker by."""

_over = threading.Event()


def end() -> None:
    _over.set()


def read(rref: rpc.RRef[int]) -> int:
    return rref.to_here()


def hand_on(rref: rpc.RRef[int]) -> int:
    return rpc.rpc_sync("worker1", read, args=(rref,))


def number() -> int:
    return int(_number)


_number = 0


def ask_guest() -> int:
    return rpc.rpc_sync("guest", number)


def ask_on() -> int:
    return rpc.rpc_sync("worker1", ask_guest)


def thrice(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def check_gradients() -> None:
    x = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [rpc.rpc_sync("worker0", thrice, args=(x,)).sum()])
        assert torch.equal(dist_autograd.get_gradients(context_id)[x], torch.full((2,), 3.0))


def keep_info() -> None:
    global _kept
    _kept = rpc.get_worker_info("guest")


def kept_info_is_refused() -> str:
    """Try every kind of call with the info of an earlier life; what it says."""
    assert _kept == rpc.get_worker_info("guest")
    texts = []
    for call in (rpc.rpc_sync, rpc.rpc_async, rpc.remote):
        with pytest.raises(StaleWorkerError) as caught:
            call(_kept, number)  # type: ignore[operator]
        texts.append(str(caught.value))
    assert len(set(texts)) == 1
    return texts[0]


_kept: rpc.WorkerInfo | None = None


def gather_here(life: int) -> dict[str, object]:
    return dict(all_gather(f"{rpc.get_worker_info().name} {life}"))


def gather_everywhere(life: int) -> None:
    others = [rpc.rpc_async(name, gather_here, args=(life,)) for name in ("worker0", "worker1")]
    wanted = {name: f"{name} {life}" for name in ("guest", "worker0", "worker1")}
    assert gather_here(life) == wanted
    assert [other.wait() for other in others] == [wanted, wanted]


def program(rank: int, method: str) -> None:
    global _number
    options = rpc.RpcBackendOptions(init_method=method)
    if rank < 2:
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=None, rpc_backend_options=options)
        assert _over.wait(60.0)
        rpc.shutdown(graceful=False)
        return
    for life in range(LIVES):
        _number = life
        rpc.init_rpc("guest", rank=2, world_size=None, rpc_backend_options=options)
        for name in ("worker0", "worker1"):
            until(lambda name=name: is_member(name), f"{name} is here")  # type: ignore[misc]
        for _ in range(CALLS if life == 0 else 1):
            assert rpc.rpc_sync("worker0", hand_on, args=(rpc.RRef(life),)) == life
            assert rpc.rpc_sync("worker0", ask_on) == life
        check_gradients()
        for _ in range(2):
            gather_everywhere(life)
        if life > 0:
            text = rpc.rpc_sync("worker0", kept_info_is_refused)
            assert "name=guest" in text, text
            assert "it left the group" in text, text
            assert "get_worker_info('guest')" in text, text
        rpc.rpc_sync("worker0", keep_info)
        if life == LIVES - 1:
            for name in ("worker0", "worker1"):
                rpc.rpc_sync(name, end)
        rpc.shutdown(graceful=False)


def test_a_worker_that_comes_again_is_called_and_shares_rrefs(cluster_in_each_mode: Cluster) -> None:
    cluster = cluster_in_each_mode
    cluster.run(program, 3, args=(cluster.new_init_method(),), init=False)


# ---- a loss that is acted on late -----------------------------------------------------------------------------------

_may_end = [threading.Event() for _ in range(2)]
_free = threading.Event()
_held: list[rpc.RRef[str]] = []


def occupy() -> None:
    _free.wait(60)


def end_life(life: int) -> None:
    _may_end[life].set()


def hold(rref: rpc.RRef[str]) -> None:
    _held.append(rref)
    until(rref.confirmed_by_owner, "the owner knows that it is held")


def value_held() -> str:
    return _held[-1].to_here()


def own_values(method: str, back: str) -> str:
    """All handler threads work for a program while the guest leaves and comes again."""
    options = rpc.RpcBackendOptions(init_method=method, num_worker_threads=2)
    rpc.init_rpc("worker0", rank=0, world_size=None, rpc_backend_options=options)
    until(lambda: is_member("guest"), "the guest is here")
    rpc.rpc_sync("guest", hold, args=(rpc.RRef("first"),))
    occupied = [rpc.rpc_async("worker0", occupy) for _ in range(8)]
    rpc.rpc_sync("guest", end_life, args=(0,))
    until(lambda: not is_member("guest"), "the guest has left")
    Path(back).touch()
    until(lambda: is_member("guest"), "the guest has come again")
    rpc.rpc_sync("guest", hold, args=(rpc.RRef("second"),))
    _free.set()
    for future in occupied:
        future.wait()
    for _ in range(20):
        rpc.rpc_sync("worker0", abs, args=(-1,))  # what waited for a thread before these is done
    value = rpc.rpc_sync("guest", value_held)
    rpc.rpc_sync("guest", end_life, args=(1,))
    rpc.shutdown(graceful=False)
    return value


def live_twice(method: str, back: str) -> None:
    options = rpc.RpcBackendOptions(init_method=method)
    for life in range(2):
        if life == 1:
            until(lambda: Path(back).exists(), "the other one has seen it leave")
        rpc.init_rpc("guest", rank=1, world_size=None, rpc_backend_options=options)
        assert _may_end[life].wait(60)
        _held.clear()
        rpc.shutdown(graceful=False)


def own_or_visit(rank: int, method: str, back: str) -> str | None:
    if rank == 0:
        return own_values(method, back)
    live_twice(method, back)
    return None


def test_a_loss_that_busy_threads_hear_of_late_takes_nothing_from_the_next_life(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """All handler threads of an owner work for a user while a holder leaves and comes again under its name and rank."""
    cluster = cluster_in_each_mode
    args = (cluster.new_init_method(), os.fspath(tmp_path / "back"))
    value, _ = cluster.run(own_or_visit, 2, args=args, init=False)
    assert value == "second"
