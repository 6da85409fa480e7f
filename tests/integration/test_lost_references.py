"""RRefs that travel in requests and answers that are lost: their values are let go of all the same."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration.faulty import Faults
from tests.kept import kept
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.errors import RpcTimeoutError
from zrpc.transport.carrier import Carrier
from zrpc.wire.messages import Message, PythonCall, PythonRemote, Reply

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.harness import Cluster

SHORT_S = 1.0
"""Time limit of calls that are lost."""
_faults: dict[type[Message], Faults] = {}


def take(*_: Any) -> int:
    return 1


def lend(value: int) -> rpc.RRef[torch.Tensor]:
    """An RRef of the callee's own."""
    return rpc.RRef(torch.full((2,), value))


def hand_on(owner: str) -> rpc.RRef[torch.Tensor]:
    """An RRef of a third worker."""
    return rpc.remote(owner, torch.ones, args=(2,))


def lose(victim: type[Message]) -> None:
    _faults[victim].arm("drop", 1)


def losing(function: Callable[..., Any], *args: Any) -> Any:
    """At the callee: the answer to this very call is lost."""
    made = function(*args)
    if isinstance(made, rpc.RRef) and not made.is_owner():
        made.to_here()  # no answer to the creation is under way
    lose(Reply)
    return made


def fails_in_time(call: Callable[[], Any]) -> None:
    with pytest.raises(RpcTimeoutError):
        call()


# ---- what is lost; each runs at worker 0 ---------------------------------------------------------------------------


def request_to_third() -> None:
    made = rpc.remote("worker1", torch.ones, args=(2,))
    made.to_here()
    lose(PythonCall)
    fails_in_time(lambda: rpc.rpc_sync("worker2", take, args=(made,), timeout=SHORT_S))


def request_to_owner() -> None:
    made = rpc.remote("worker1", torch.ones, args=(2,))
    made.to_here()
    lose(PythonCall)
    fails_in_time(lambda: rpc.rpc_sync("worker1", take, args=([made, made],), timeout=SHORT_S))


def request_with_own() -> None:
    own = rpc.RRef(torch.ones(2))
    lose(PythonCall)
    fails_in_time(lambda: rpc.rpc_async("worker1", take, args=(own,), timeout=SHORT_S).wait())


def creation_with_own() -> None:
    lose(PythonRemote)
    made = rpc.remote("worker1", take, args=(rpc.RRef(torch.ones(2)),), timeout=SHORT_S)
    with pytest.raises(RuntimeError):
        made.to_here()


def cancelled_request() -> None:
    own = rpc.RRef(torch.ones(2))
    lose(PythonCall)
    future = rpc.rpc_async("worker1", take, args=(own,))
    assert future.cancel()
    with suppress(Exception):
        future.wait()


def answer_of_owner() -> None:
    fails_in_time(lambda: rpc.rpc_sync("worker1", losing, args=(lend, 3), timeout=SHORT_S))


def answer_of_user() -> None:
    fails_in_time(lambda: rpc.rpc_sync("worker1", losing, args=(hand_on, "worker2"), timeout=SHORT_S))


def answer_with_callers_own() -> None:
    own = rpc.RRef(torch.ones(2))
    fails_in_time(lambda: rpc.rpc_sync("worker1", losing, args=(identity, own), timeout=SHORT_S))


def identity(value: Any) -> Any:
    return value


CASES = (
    request_to_third, request_to_owner, request_with_own, creation_with_own, cancelled_request, answer_of_owner,
    answer_of_user, answer_with_callers_own,
)  # fmt: skip


def run_case(rank: int, number: int, folder: Path) -> None:
    for victim in (PythonCall, PythonRemote, Reply):
        _install(victim)
    current_agent().set_rpc_timeout(60.0)
    meet(folder, "begin", rank)
    if rank == 0:
        CASES[number]()
    meet(folder, "end", rank)
    until(lambda: gc.collect() >= 0 and not kept(), "nothing is kept", kept)
    meet(folder, "clean", rank)
    assert rank or _faults[Reply].done + _faults[PythonCall].done + _faults[PythonRemote].done or number > 4


def _install(victim: type[Message]) -> None:
    faults, send = Faults(victim), Carrier.send
    _faults[victim] = faults
    Carrier.send = lambda carrier, peer, envelope, **how: faults.send(carrier, peer, envelope, by=send, **how)  # type: ignore[method-assign]


def meet(folder: Path, what: str, rank: int) -> None:
    """Wait for the other two, without a message."""
    (folder / f"{what} {rank}").touch()
    until(lambda: len(list(folder.glob(f"{what} *"))) == 3, f"all have come to {what}", within_s=60.0)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.__name__ for case in CASES])
def test_nothing_is_kept_of_references_in_a_lost(number: int, cluster: Cluster, tmp_path: Path) -> None:
    """The caller runs into its time limit; then no worker counts a fork, or waits for one."""
    folder = tmp_path / "met"
    folder.mkdir()
    cluster.run(run_case, 3, args=(number, folder))
