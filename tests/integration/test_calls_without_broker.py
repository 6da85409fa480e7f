"""Calls, references and gradients while the broker dies and comes back: each call runs once at most, and all end."""

from __future__ import annotations

import collections
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration.harness import free_port
from tests.waiting import until
from zrpc.autograd import backward, context, get_gradients
from zrpc.errors import ConnectionLostError, RpcTimeoutError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a way to make a process stand still")

SECONDS = 60.0
ran: collections.Counter[str] = collections.Counter()


def note(call: str, pause_s: float = 0.0) -> str:
    ran[call] += 1
    time.sleep(pause_s)
    return call


def all_that_ran() -> dict[str, int]:
    return dict(ran)


def start_broker(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zrpc_broker", "--bind", f"tcp://127.0.0.1:{port}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


class Killing:
    """A broker that is killed and started again, in the process of the test.

    Attributes:
        port: where it listens.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._process = start_broker(self.port)

    def again(self) -> None:
        self.kill()
        self._process = start_broker(self.port)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def start(self) -> None:
        self._process = start_broker(self.port)


@pytest.fixture
def broker() -> Any:
    made = Killing()
    yield made
    made.kill()


@pytest.fixture
def signals(tmp_path: Path) -> Path:
    """A directory where files tell how far the workers are."""
    return tmp_path


def say(where: Path, what: str) -> None:
    (where / what).touch()


def await_said(where: Path, *what: str) -> None:
    until(lambda: all((where / one).exists() for one in what), f"{what} came")


# ---- a mixed load ---------------------------------------------------------------------------------------------------


def call_all_the_while(rank: int, where: Path) -> dict[str, Any]:
    """Call both others, from two threads each, until told to stop; what became of each call."""
    outcomes: dict[str, str] = {}

    def call(peer: str, thread: int) -> None:
        number = 0
        while not (where / "stop").exists():
            name = f"{rank}-{peer}-{thread}-{number}"
            number += 1
            try:
                outcomes[name] = "answered" if rpc.rpc_sync(peer, note, args=(name,), timeout=20) == name else "wrong"
            except ConnectionLostError:
                outcomes[name] = "unknown"

    peers = [f"worker{other}" for other in range(3) if other != rank]
    threads = [threading.Thread(target=call, args=(peer, number)) for peer in peers for number in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(outcomes) > 20, "it calls")
    say(where, f"calls{rank}")
    for thread in threads:
        thread.join()
    return outcomes


def calls_and_counts(rank: int, where: Path) -> dict[str, Any]:
    outcomes = call_all_the_while(rank, where)
    say(where, f"stopped{rank}")
    await_said(where, *(f"stopped{other}" for other in range(3)))
    counts: collections.Counter[str] = collections.Counter()
    for other in range(3):
        counts.update(rpc.rpc_sync(f"worker{other}", all_that_ran))
    assert max(counts.values()) == 1, "no call ran twice"
    assert all(counts[name] == 1 for name, became in outcomes.items() if became == "answered")
    return dict(collections.Counter(outcomes.values()))


@pytest.mark.parametrize("shared_memory", [False, True], ids=["relayed", "local"])
def test_no_call_runs_twice_and_all_end_while_the_broker_is_killed(
    cluster: Cluster, broker: Killing, signals: Path, shared_memory: bool
) -> None:
    """It is killed four times. Those that were on their way say that it is not known whether they ran."""
    running = cluster.start(
        calls_and_counts, 3, args=(signals,), init_method=f"broker://127.0.0.1:{broker.port}",
        shared_memory=shared_memory,
    )  # fmt: skip
    await_said(signals, "calls0", "calls1", "calls2")
    for _ in range(4):
        broker.again()
        time.sleep(1.0)  # for calls to go on, and to be under way when it dies next
    say(signals, "stop")
    outcomes = running.wait(SECONDS)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    became: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        became.update(outcome.result)
    assert set(became) <= {"answered", "unknown"}
    assert became["answered"] > 100
    if shared_memory:
        assert not became["unknown"], "workers of one host do not notice"


# ---- what lasts -----------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self, by: int) -> int:
        self.value += by
        return self.value


def failure(call: str) -> str:
    try:
        rpc.rpc_sync("worker1", note, args=(call,), timeout=0.2)
    except (RpcTimeoutError, ConnectionLostError) as error:
        return str(error)
    return ""


def keep_references(rank: int, where: Path) -> None:
    if rank == 0:
        rref = rpc.remote("worker1", Counter)
        assert rref.rpc_sync().add(1) == 1
        tensor = rpc.remote("worker1", torch.ones, args=(3,))
        tensor.to_here()
        say(where, "made")
        await_said(where, "killed")
        until(lambda: "It was not sent" in failure("perhaps"), "it is noticed that the broker is gone")
        waiting = rpc.rpc_async("worker1", note, args=("sent later",), timeout=SECONDS)
        assert "It was not sent" in failure("too late")
        say(where, "waits")
        assert waiting.wait() == "sent later"
        assert rref.rpc_sync().add(1) == 2, "the value lives"
        assert torch.equal(tensor.to_here(), torch.ones(3))
        assert rpc.rpc_sync("worker1", all_that_ran) == {"sent later": 1}, "and none that failed"
        learn()
        say(where, "done")
    else:
        await_said(where, "done")


def learn() -> None:
    """A distributed backward pass."""
    with context() as context_id:
        weight = torch.ones(3, requires_grad=True)
        loss = rpc.rpc_sync("worker1", torch.mul, args=(weight, 2.0)).sum()
        backward(context_id, [loss])
        assert torch.equal(get_gradients(context_id)[weight], torch.full((3,), 2.0))


def test_references_live_on_and_calls_made_meanwhile_are_sent_later(
    cluster: Cluster, broker: Killing, signals: Path
) -> None:
    """A call whose time runs out before a broker comes back is never sent, and says so. Gradients flow afterwards."""
    running = cluster.start(
        keep_references, 2, args=(signals,), init_method=f"broker://127.0.0.1:{broker.port}", shared_memory=False
    )
    await_said(signals, "made")
    broker.kill()
    say(signals, "killed")
    await_said(signals, "waits")
    broker.start()
    assert [outcome.error for outcome in running.wait(SECONDS)] == [None] * 2


def shut_down_meanwhile(rank: int, where: Path, method: str) -> float:
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    rpc.rpc_sync(f"worker{1 - rank}", note, args=(f"{rank}",))
    say(where, f"called{rank}")
    await_said(where, "killed")
    began = time.monotonic()
    rpc.shutdown()
    return time.monotonic() - began


def test_a_shutdown_ends_while_there_is_no_broker(cluster: Cluster, broker: Killing, signals: Path) -> None:
    """Workers of one host wait for each other as ever, and for no broker for long."""
    method = f"broker://127.0.0.1:{broker.port}"
    running = cluster.start(shut_down_meanwhile, 2, args=(signals, method), init=False)
    await_said(signals, "called0", "called1")
    broker.kill()
    say(signals, "killed")
    outcomes = running.wait(SECONDS)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    assert all(outcome.result < 20 for outcome in outcomes)


def shut_down_when_it_is_back(rank: int, where: Path, method: str) -> None:
    options = rpc.RpcBackendOptions(init_method=method, shared_memory=False)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    rpc.rpc_sync(f"worker{1 - rank}", note, args=(f"{rank}",))
    if rank == 1:
        say(where, "waits")
        rpc.shutdown()  # its word to the leader is on its way or kept
    else:
        await_said(where, "back")
        rpc.shutdown()


def test_a_shutdown_that_waits_for_others_survives_the_death_of_the_broker(
    cluster: Cluster, broker: Killing, signals: Path
) -> None:
    """One waits for the other when the broker is killed; neither sees an error."""
    method = f"broker://127.0.0.1:{broker.port}"
    running = cluster.start(shut_down_when_it_is_back, 2, args=(signals, method), init=False)
    await_said(signals, "waits")
    broker.again()
    say(signals, "back")
    assert [outcome.error for outcome in running.wait(SECONDS)] == [None] * 2
