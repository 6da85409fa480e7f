"""One name dies and comes again while others work: each call is answered or fails within its limits, and none hangs.

Three workers stay. They call each other and the guest, hand references on, and take gradients. The guest makes
references on them, hands them on, and is killed in the middle, again and again.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
import zrpc.autograd as dist_autograd
from tests.integration.harness import Cluster, free_port, is_member
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.autograd.service import AutogradService
from zrpc.errors import PeerLostError, RefusedError, RRefError, UnknownWorkerError
from zrpc.rref.context import RRefContext

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS = ("env", "tcp", "file", "broker")
LIVES = 10
NUM_STAYING = 3
STAYING = [f"worker{rank}" for rank in range(NUM_STAYING)]
LIMIT_S = 20.0
"""Of each call. One that ends by it was lost."""


@pytest.fixture(params=WAYS)
def meeting(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A cluster and where its workers meet, in each of the four ways."""
    way = request.param
    cluster = Cluster("tcp" if way == "env" else way, tmp_path)
    yield cluster, f"env://127.0.0.1:{free_port()}" if way == "env" else cluster.new_init_method()
    cluster.close()


def init(name: str, rank: int, method: str, **options: Any) -> None:
    """Come into the group that grows and shrinks at `method`."""
    os.environ.pop("WORLD_SIZE", None)
    if method.startswith("env://"):
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = method.removeprefix("env://").split(":")
        method = "env://"
    options = {"init_method": method, "rpc_timeout": LIMIT_S, **options}
    rpc.init_rpc(name, rank=rank, world_size=None, rpc_backend_options=rpc.RpcBackendOptions(**options))


def identity(value: Any) -> Any:
    return value


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def fetched(rref: rpc.RRef[Any]) -> Any:
    return rref.to_here(timeout=LIMIT_S)


def call(chance: random.Random, to: str) -> None:
    assert rpc.rpc_sync(to, identity, args=(7,)) == 7


def hand_on(chance: random.Random, to: str) -> None:
    """A reference to a value of `to` is read by a third worker."""
    made = rpc.remote(to, identity, args=(8,))
    assert rpc.rpc_sync(chance.choice(STAYING), fetched, args=(made,)) == 8


def own(chance: random.Random, to: str) -> None:
    """A reference to a value of this worker is read by `to`."""
    assert rpc.rpc_sync(to, fetched, args=(rpc.RRef(9),)) == 9


def differentiate(chance: random.Random, to: str) -> None:
    x = torch.ones(4, requires_grad=True)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync(to, scaled, args=(rpc.rpc_sync(chance.choice(STAYING), scaled, args=(x,)),))
        dist_autograd.backward(context_id, [y.sum()])
        assert torch.equal(dist_autograd.get_gradients(context_id)[x], torch.full((4,), 9.0))


WORK: tuple[Callable[[random.Random, str], None], ...] = (call, hand_on, own, differentiate)


def work(seed: int, over: str, told: Counter[str], wrong: list[str]) -> None:
    """Make calls until `over` is there; those to workers that stay must succeed, whatever the guest does."""
    chance = random.Random(seed)
    while not Path(over).exists():
        to = chance.choice([*STAYING, "guest"])
        what = chance.choice(WORK)
        began = time.monotonic()
        try:
            what(chance, to)
            told["answered"] += 1
        except Exception as error:
            is_loss = isinstance(error, PeerLostError | UnknownWorkerError | RRefError) or "is lost" in str(error)
            told[f"{what.__name__} {to}: {type(error).__name__}"] += 1
            if to != "guest" or not is_loss:
                wrong.append(f"{what.__name__} of {to} {time.monotonic() - began:.1f} s: {error!r}")
        if to == "guest" and not is_member("guest"):
            time.sleep(0.01)


def stay(rank: int, method: str, over: str) -> tuple[dict[str, int], list[str]]:
    init(f"worker{rank}", rank, method)
    for name in STAYING:
        until(lambda name=name: is_member(name), f"{name} is here")  # type: ignore[misc]
    told: Counter[str] = Counter()
    wrong: list[str] = []
    threads = [threading.Thread(target=work, args=(rank * 10 + n, over, told, wrong)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Path(f"{over}-{rank}").touch()
    for other in range(NUM_STAYING):
        until(lambda other=other: Path(f"{over}-{other}").exists(), "all have stopped", within_s=60)  # type: ignore[misc]
    contexts = current_agent().extensions[AutogradService]
    until(lambda: contexts.debug_info()["num_autograd_contexts"] == 0, "contexts are freed", contexts.debug_info)
    rrefs = current_agent().extensions[RRefContext]
    until(lambda: rrefs.debug_info()["num_owner_rrefs"] == "0", "forks are dropped", rrefs.debug_info)
    began = time.monotonic()
    rpc.shutdown()
    took_s = time.monotonic() - began
    if took_s > LIMIT_S / 2:
        wrong.append(f"shutdown took {took_s:.1f} s")
    return dict(told), wrong


def visit(_: int, method: str, life: int) -> None:
    """One life: make references on workers that stay, hand them on without waiting, until killed."""

    def join() -> bool:
        try:
            init("guest", NUM_STAYING, method)
        except RefusedError:  # the broker has not heard of the death yet
            return False
        return True

    until(join, "the name is free")
    chance = random.Random(life)
    while True:
        a, b = chance.sample(STAYING, 2)
        x = torch.ones(100_000)
        made = [rpc.remote(a, identity, args=(x,)) for _ in range(4)]
        for one in made:
            rpc.rpc_async(b, fetched, args=(one,))
        if chance.random() < 0.2:
            time.sleep(0.01)


def test_a_name_that_dies_and_comes_again_hangs_no_call(meeting: tuple[Cluster, str], tmp_path: Path) -> None:
    """Calls, references and gradients of the others all succeed; those with the guest succeed or fail at once."""
    cluster, method = meeting
    over = tmp_path / "over"
    staying = cluster.start(stay, NUM_STAYING, args=(method, os.fspath(over)), init=False)
    chance = random.Random(1)
    for life in range(LIVES):
        guest = cluster.start(visit, 1, args=(method, life), init=False)
        time.sleep(0.3 + 0.7 * chance.random())
        guest.kill(0)
    over.touch()
    for outcome in staying.wait(120.0):
        assert outcome.error is None, outcome.error
        print(outcome.result[0])
        assert not outcome.result[1], outcome.result[1][:5]
