"""A worker of a dynamic group is killed and started again under its name and rank, while the others work.

No goodbye is said: what the dead life held ends with it, its name and rank are free, and the next life has all rights.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import zrpc as rpc
import zrpc.autograd as dist_autograd
from tests.integration.harness import Cluster, is_member
from tests.integration.test_coming_again import check_gradients, gather_everywhere, hand_on
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.errors import PeerLostError, RefusedError, StaleWorkerError
from zrpc.rref.context import RRefContext

LIVES = 4
STAYING = ("worker0", "worker1")

_kept: dict[str, Any] = {}


def identity(value: Any) -> Any:
    return value


def wait_for_ever() -> None:
    threading.Event().wait()


def keep_of_guest(rref: rpc.RRef[int]) -> int:
    """On a worker that stays: keep whatever can be kept of the guest's present life."""
    _kept["rref"] = rref
    _kept["info"] = rpc.get_worker_info("guest")
    _kept["waiting"] = rpc.rpc_async("guest", wait_for_ever, timeout=0)
    return rref.to_here()


def check_that_it_is_over() -> None:
    """On a worker that stays: all that was kept says that its worker is gone, though another has its name."""
    with pytest.raises(PeerLostError):
        _kept["waiting"].wait()
    with pytest.raises(PeerLostError):
        _kept["rref"].to_here()
    assert _kept["info"] == _kept["rref"].owner() == rpc.get_worker_info("guest")
    for info in (_kept["info"], _kept["rref"].owner()):
        for call in (rpc.rpc_sync, rpc.rpc_async, rpc.remote):
            with pytest.raises(StaleWorkerError, match=r"get_worker_info\('guest'\)"):
                call(info, identity, args=(1,))  # type: ignore[operator]
    until(lambda: dist_autograd._get_debug_info()["num_autograd_contexts"] == 0, "its contexts are released")
    rrefs = current_agent().extensions[RRefContext]
    until(lambda: rrefs.debug_info()["num_owner_rrefs"] == "0", "its references are given up")


def stay(rank: int, method: str, over: str) -> int:
    """Work with the other one that stays, until the file `over` is there; how many calls were made."""
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=None, rpc_backend_options=options)
    other = STAYING[1 - rank]
    until(lambda: is_member(other), f"{other} is here")
    made = 0
    while not Path(over).exists():
        try:
            assert rpc.rpc_sync(other, identity, args=(made,)) == made
        except PeerLostError:  # the other one has come to its end first
            until(Path(over).exists, "it is over")
        made += 1
    rpc.shutdown(graceful=False)
    return made


def visit(_: int, method: str, life: int, ready: str) -> None:
    """One life of the guest. All but the last end by being killed."""
    options = rpc.RpcBackendOptions(init_method=method)

    def join() -> bool:
        try:
            rpc.init_rpc("guest", rank=2, world_size=None, rpc_backend_options=options)
        except RefusedError:  # the broker has not heard of the death yet
            assert method.startswith("broker://")
            return False
        return True

    until(join, "the name is free")
    for name in STAYING:
        until(lambda name=name: is_member(name), f"{name} is here")  # type: ignore[misc]
    if life > 0:
        for name in STAYING:
            rpc.rpc_sync(name, check_that_it_is_over)
    for _ in range(2):
        gather_everywhere(life)
    assert rpc.rpc_sync("worker0", hand_on, args=(rpc.RRef(life),)) == life
    check_gradients()
    if life == LIVES - 1:
        rpc.shutdown(graceful=False)
        return
    with dist_autograd.context():
        held = [rpc.rpc_sync(name, keep_of_guest, args=(rpc.RRef(life),)) for name in STAYING]
        mine = [rpc.remote(name, identity, args=(life,)) for name in STAYING]
        assert held == [rref.to_here() for rref in mine] == [life, life]
        Path(ready).touch()
        wait_for_ever()


def test_a_worker_that_is_killed_again_and_again_leaves_its_place_to_the_next(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """Nothing of one life is taken for another's, and the others' calls among themselves all succeed."""
    cluster = cluster_in_each_mode
    method = cluster.new_init_method()
    over = tmp_path / "over"
    staying = cluster.start(stay, 2, args=(method, os.fspath(over)), init=False)
    for life in range(LIVES):
        ready = tmp_path / f"ready{life}"
        guest = cluster.start(visit, 1, args=(method, life, os.fspath(ready)), init=False)
        if life < LIVES - 1:
            until(lambda ready=ready, guest=guest: ready.exists() or not guest.processes[0].is_alive(), "it is ready")  # type: ignore[misc]
            if not ready.exists():
                pytest.fail(str(guest.wait(1.0)[0].error))
            guest.kill(0)
        else:
            (outcome,) = guest.wait(60.0)
            assert outcome.error is None, outcome.error
    over.touch()
    for outcome in staying.wait(60.0):
        assert outcome.error is None, outcome.error
        assert outcome.result > 0
