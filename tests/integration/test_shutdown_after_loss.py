"""A graceful shutdown of a static group waits for the living, also after others have died."""

from __future__ import annotations

import os
import re
import signal
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

import zrpc as rpc
from tests.integration.harness import MODES
from zrpc import ending, errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.harness import Cluster

FIRST = ["cluster_in_each_mode"]
CALLS = 30
_at_end = threading.Event()
_kept: list[rpc.RRef[str]] = []


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_at_end() -> bool:
    return _at_end.wait(30)


def wait_for_nothing() -> bool:
    return threading.Event().wait(30)


def double(n: int) -> int:
    return 2 * n


def keep(held: rpc.RRef[str]) -> None:
    _kept.append(held)


SCENARIOS = {
    "the leader serves, and a worker died": ["serves", "trains", "dies"],
    "a follower serves, and a worker died": ["trains", "serves", "dies"],
    "the leader died": ["dies", "serves", "trains"],
    "the leader died, and the next one": ["dies", "dies", "serves", "trains"],
    "the last two died": ["serves", "trains", "dies", "dies"],
    "a worker died in its shutdown": ["serves", "trains", "dies at its end"],
    "the leader died in its shutdown": ["dies at its end", "serves", "trains"],
    "the leader died in its shutdown, and another before": ["dies at its end", "serves", "dies", "trains"],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    ("cluster_in_each_mode", "shutdown"), [*((mode, "zrpc") for mode in MODES), ("file", "torch")], indirect=FIRST
)
def test_those_who_have_not_come_are_served_and_all_learn_who_died(
    cluster_in_each_mode: Cluster, scenario: str, shutdown: str
) -> None:
    """A worker in its shutdown serves the living until they come to theirs; then all get an error naming the dead."""
    roles, cluster = SCENARIOS[scenario], cluster_in_each_mode
    args = (cluster.new_init_method(), roles, shutdown)
    outcomes = cluster.start(play, len(roles), args=args, init=False).wait(150)
    dead = [f"worker{rank}" for rank, role in enumerate(roles) if role.startswith("dies")]
    alive = [outcome for outcome in outcomes if not roles[outcome.rank].startswith("dies")]
    assert [outcome.error for outcome in alive] == [None] * len(alive)
    assert [outcome.result for outcome in alive] == [dead] * len(alive)


def play(rank: int, init_method: str, roles: list[str], shutdown: str) -> list[str]:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=len(roles), rpc_backend_options=options)
    if roles[rank] == "dies":
        rpc.rpc_sync(f"worker{roles.index('serves')}", keep, args=(rpc.RRef("held"),))  # both hold what is the other's
        held = rpc.remote(f"worker{roles.index('serves')}", str)
        held.to_here()
        die()
    if roles[rank] == "trains":
        train(roles)
    _at_end.set()
    return names_lost(shutdown_of(shutdown))


def train(roles: list[str]) -> None:
    server = f"worker{roles.index('serves')}"
    assert rpc.rpc_sync(server, wait_until_at_end)
    for rank, role in enumerate(roles):
        if role == "dies at its end":
            assert rpc.rpc_sync(f"worker{rank}", wait_until_at_end)
        if role.startswith("dies"):
            with pytest.raises(errors.PeerLostError):
                rpc.rpc_sync(f"worker{rank}", die)
    held = rpc.remote(server, double, args=(3,))
    assert held.to_here() == 6
    assert [rpc.rpc_sync(server, double, args=(n,)) for n in range(CALLS)] == [2 * n for n in range(CALLS)]


def shutdown_of(name: str) -> Callable[[], None]:
    if name == "zrpc":
        return rpc.shutdown
    import zrpc.compat.rpc

    return zrpc.compat.rpc.shutdown


def names_lost(shutdown: Callable[[], None]) -> list[str]:
    with pytest.raises(errors.PeerLostError) as caught:
        shutdown()
    with pytest.raises(errors.NotInitializedError):
        rpc.get_worker_info()
    return re.findall(r"(worker\d) is lost \(", str(caught.value))


@pytest.mark.parametrize("dying", [0, 1, 2])
def test_a_worker_that_dies_between_the_two_waits_of_shutdown_is_named(cluster: Cluster, dying: int) -> None:
    """All have come, and a worker, maybe the leader, dies before it is through: the others get an error naming it."""
    outcomes = cluster.start(die_halfway, 3, args=(cluster.new_init_method(), dying), init=False).wait(150)
    alive = [outcome for outcome in outcomes if outcome.rank != dying]
    assert [outcome.error for outcome in alive] == [None, None]
    assert [outcome.result for outcome in alive] == [[f"worker{dying}"]] * 2


def die_halfway(rank: int, init_method: str, dying: int) -> list[str]:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
    if rank == dying:
        ending.delete_rrefs = lambda *_: die()
    return names_lost(rpc.shutdown)


@rpc.functions.async_execution
def never_answers() -> torch.futures.Future[int]:
    return torch.futures.Future()


@pytest.mark.parametrize("shutdown", ["zrpc", "torch"])
def test_a_request_that_is_never_answered_holds_no_shutdown_up_once_its_caller_died(
    cluster: Cluster, shutdown: str
) -> None:
    """A server that gathers updates of all trainers waits for one that died: its shutdown ends all the same."""
    args = (cluster.new_init_method(), shutdown)
    outcomes = cluster.start(leave_unanswered, 3, args=args, init=False).wait(150)
    assert [outcome.error for outcome in outcomes if outcome.rank != 2] == [None, None]


def leave_unanswered(rank: int, init_method: str, shutdown: str) -> list[str]:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
    if rank == 2:
        rpc.rpc_async("worker0", never_answers)
        rpc.rpc_sync("worker0", double, args=(1,))
        die()
    return names_lost(shutdown_of(shutdown))


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize(
    ("cluster_in_each_mode", "shutdown"), [("file", "zrpc"), ("broker", "zrpc"), ("file", "torch")], indirect=FIRST
)
def test_the_time_limit_of_shutdown_names_those_who_did_not_come(
    cluster_in_each_mode: Cluster, late: int, shutdown: str
) -> None:
    """Each worker that came in vain names the worker that did not, and no other."""
    cluster = cluster_in_each_mode
    outcomes = cluster.start(be_late, 3, args=(cluster.new_init_method(), late, shutdown), init=False).wait(150)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    said = [outcome.result for outcome in outcomes if outcome.rank != late]
    assert [re.findall(r"[:,] ([\w, ]+) did not come within 1 s", text) for text in said] == [[f"worker{late}"]] * 2


def be_late(rank: int, init_method: str, late: int, shutdown: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=3, rpc_backend_options=options)
    if rank == late:
        for other in {0, 1, 2} - {late}:
            with pytest.raises(errors.PeerLostError):
                rpc.rpc_sync(f"worker{other}", wait_for_nothing)
        rpc.shutdown(graceful=False)
        return ""
    with pytest.raises(errors.PeerLostError) as caught:
        partial(shutdown_of(shutdown), timeout=1)()
    return str(caught.value)
