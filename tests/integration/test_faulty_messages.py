"""Each message between workers is dropped, once and repeatedly, delayed, and repeated where it may be.

What is idempotent is sent again until it is acknowledged: then nothing is noticed. Any other message is sent once: its
call ends at its time limit, and the next attempt is as good as the first.
"""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration.faulty import Fault, Faults
from tests.kept import kept
from tests.waiting import until
from zrpc import autograd as dist_autograd
from zrpc.agent import client
from zrpc.agent.current import current_agent
from zrpc.errors import RpcTimeoutError, RRefError
from zrpc.transport.carrier import Carrier
from zrpc.wire.messages import (
    MESSAGES,
    Forming,
    Heartbeat,
    JoinContexts,
    Joined,
    Leave,
    Left,
    Message,
    Refused,
    Register,
    Welcome,
)
from zrpc.wire.observing import Attach, Attached, Look, Seen
from zrpc.wire.rejoining import Locate, Located, Rejoin

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.harness import Cluster

OF_BROKERS = {Register, Welcome, Refused, Joined, Left, Leave, Heartbeat, Forming, Rejoin, Locate, Located}
OF_OBSERVERS = {Attach, Attached, Look, Seen}
"""Who looks from outside asks again: see test_sight.py."""
AFTER_A_LOSS = {JoinContexts}
BETWEEN_WORKERS = sorted(
    set(MESSAGES.values()) - OF_BROKERS - OF_OBSERVERS - AFTER_A_LOSS, key=lambda message: message.CODE
)
PHASES: tuple[tuple[Fault, int], ...] = (("drop", 1), ("drop", 3), ("delay", 1), ("delay", 3), ("repeat", 3))
NUM_ATTEMPTS = 20
SHORT_S = 1.0
"""Time limit of calls where a message may be missing for good."""
LONG_S = 60.0
REPEAT_S = 0.2


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


def fail(text: str) -> None:
    raise ValueError(text)


def value_of(rref: rpc.RRef[torch.Tensor]) -> torch.Tensor:
    return rref.to_here() + 1


def lend(value: torch.Tensor) -> rpc.RRef[torch.Tensor]:
    return rpc.RRef(value)


def borrow_from(owner: str) -> torch.Tensor:
    """Fetch what lies on `owner`, through an RRef that came in an answer."""
    return rpc.rpc_sync(owner, lend, args=(torch.ones(2),)).to_here()


def through(owner: str, x: torch.Tensor) -> torch.Tensor:
    return rpc.rpc_sync(owner, add, args=(x, x))


# ---- what is done; each says what must come of it ------------------------------------------------------------------


def call() -> None:
    assert rpc.rpc_sync("worker1", add, args=(torch.ones(2), 1)).tolist() == [2, 2]
    assert rpc.rpc_sync("worker2", torch.add, args=(torch.ones(2), 2)).tolist() == [3, 3]
    with pytest.raises(ValueError, match="as it must"):
        rpc.rpc_sync("worker1", fail, args=("as it must",))


def reference() -> None:
    of_python = rpc.remote("worker1", add, args=(torch.ones(2), 1))
    of_operator = rpc.remote("worker1", torch.add, args=(torch.ones(2), 2))
    assert rpc.rpc_sync("worker2", value_of, args=(of_python,)).tolist() == [3, 3]
    assert rpc.rpc_sync("worker1", value_of, args=(of_operator,)).tolist() == [4, 4]
    assert rpc.rpc_sync("worker2", borrow_from, args=("worker1",)).tolist() == [1, 1]
    assert (of_python.to_here() + of_operator.to_here()).tolist() == [5, 5]


def gradients() -> None:
    for mode in ("fast", "smart"):
        with dist_autograd.context() as context_id:
            x = torch.ones(2, requires_grad=True)
            loss = rpc.rpc_sync("worker1", through, args=("worker2", x)).sum()
            dist_autograd.backward(context_id, [loss], mode=mode)
            assert dist_autograd.get_gradients(context_id)[x].tolist() == [2, 2]
    with dist_autograd.context() as context_id:
        x = torch.ones(2, requires_grad=True)
        rpc.remote("worker1", loss_of, args=(x,)).backward(context_id)
        assert dist_autograd.get_gradients(context_id)[x].tolist() == [3, 3]


def loss_of(x: torch.Tensor) -> torch.Tensor:
    return (3 * x).sum()


def failed_pass() -> None:
    """A backward pass that fails at another worker, which tells the third."""
    with dist_autograd.context() as context_id:
        x = torch.ones(2, requires_grad=True)
        loss = rpc.rpc_sync("worker1", through_failing, args=("worker2", x)).sum()
        with pytest.raises(RuntimeError, match=r"on purpose|time limit"):
            dist_autograd.backward(context_id, [loss])


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")


def apply_failing(x: torch.Tensor) -> torch.Tensor:
    return Failing.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def through_failing(owner: str, x: torch.Tensor) -> torch.Tensor:
    return rpc.rpc_sync(owner, apply_failing, args=(x,)) + x


def given_up() -> None:
    """A creation whose time limit ends before it does. What asks for its value may be early enough to wait for it."""
    late = rpc.remote("worker1", time.sleep, args=(0.2,), timeout=0.05)
    with suppress(RpcTimeoutError, RRefError):
        late.to_here()


WORK = (call, reference, gradients, failed_pass, given_up)


# ---- the workers ---------------------------------------------------------------------------------------------------


def attempt(work: Callable[[], None], may_fail: bool) -> None:
    """Do it until it is done; what may not fail is done at once."""
    for _ in range(NUM_ATTEMPTS):
        try:
            work()
        except (RuntimeError, RRefError) as error:  # time limits, and what they lead to
            if not may_fail:
                raise
            last = error
        else:
            return
    raise AssertionError(f"{work.__name__} failed {NUM_ATTEMPTS} times: {last}")


def meet(folder: Path, what: str, rank: int) -> None:
    """Wait for the other two, without a message."""
    (folder / f"{what} {rank}").touch()
    until(lambda: len(list(folder.glob(f"{what} *"))) == 3, f"all have come to {what}", within_s=LONG_S)


def do_everything(rank: int, code: int, folder: Path) -> int:
    """All kinds of traffic between three workers, in each phase; how often something was done to messages here."""
    victim: type[Message] = MESSAGES[code]
    client.NOTIFY_TIMEOUT_S = REPEAT_S
    faults = Faults(victim)
    Carrier.send = lambda carrier, peer, envelope, **how: faults.send(carrier, peer, envelope, **how)  # type: ignore[method-assign]
    for number, (fault, times) in enumerate(PHASES):
        if fault == "repeat" and not victim.IDEMPOTENT:
            continue
        may_fail = fault == "drop" and not victim.IDEMPOTENT
        current_agent().set_rpc_timeout(SHORT_S if may_fail else LONG_S)
        faults.arm(fault, times)
        meet(folder, f"begin {number}", rank)
        if rank == 0:
            for work in WORK:
                attempt(work, may_fail)
        meet(folder, f"end {number}", rank)
        faults.arm(fault, 0)
        gc.collect()
        until(lambda: not kept(), "no reference and no context is kept", kept)
        meet(folder, f"clean {number}", rank)
    return faults.done


@pytest.mark.parametrize("victim", BETWEEN_WORKERS, ids=lambda victim: victim.__name__)
def test_work_is_done_whatever_becomes_of(victim: type[Message], cluster: Cluster, tmp_path: Path) -> None:
    """Every call ends, results and gradients are right, and nothing is kept in the end."""
    folder = tmp_path / "met"
    folder.mkdir()
    done = cluster.run(do_everything, 3, args=(victim.CODE, folder))
    assert sum(done), "the message was sent"


def know_a_context(rank: int, fault: Fault, folder: Path) -> None:
    """Worker 2 hears of worker 0's context from worker 1, which dies; so it asks worker 0 to tell of its end."""
    client.NOTIFY_TIMEOUT_S = REPEAT_S
    faults = Faults(JoinContexts)
    Carrier.send = lambda carrier, peer, envelope, **how: faults.send(carrier, peer, envelope, **how)  # type: ignore[method-assign]
    faults.arm(fault, 3)
    if rank == 1:
        meet(folder, "known", rank)
        (folder / "dead").touch()
        os._exit(1)
    if rank == 0:
        with dist_autograd.context():
            rpc.rpc_sync("worker1", through, args=("worker2", torch.ones(2, requires_grad=True)))
            meet(folder, "known", rank)
            until((folder / "heard").exists, "worker 2 has heard of the loss")
    else:
        meet(folder, "known", rank)
        assert kept() == {"num_autograd_contexts": 1}
        until(lambda: faults.done, "worker 0 is asked")
        (folder / "heard").touch()
    until(lambda: not kept(), "no context is kept", kept)
    if faults.done:
        (folder / f"sent {rank}").touch()


@pytest.mark.parametrize("fault", ["drop", "delay", "repeat"])
def test_the_end_of_a_context_is_told_also_if_who_told_of_it_died(
    fault: Fault, cluster: Cluster, tmp_path: Path
) -> None:
    """The request for that (`JoinContexts`) may be lost three times."""
    folder = tmp_path / "met"
    folder.mkdir()
    first, second, third = cluster.start(know_a_context, 3, args=(fault, folder)).wait(LONG_S)
    assert second.exitcode == 1
    for other in (first, third):
        assert "WorkersLostError: all other workers came to their shutdown, but worker1 is lost" in (other.error or "")
    assert len(list(folder.glob("sent *"))) == 1, "the message was sent, by worker 2"
