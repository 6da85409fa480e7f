"""What users of torch.distributed.rpc complain of does not happen here. docs/complaints.md has the whole list."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

import zrpc as rpc
from tests.integration.harness import Cluster, is_member
from tests.waiting import until
from zrpc import errors
from zrpc.gather import all_gather

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_S = 20.0
PROMPT_S = 5.0
"""How long leaving may take. Well below every time limit that it could be waiting for."""
MANY = 40


@pytest.fixture
def broker_cluster(tmp_path: Path) -> Any:
    """Workers with a broker."""
    started = Cluster("broker", tmp_path)
    yield started
    started.close()


def double(n: int) -> int:
    return 2 * n


def boom(text: str) -> None:
    raise ValueError(text)


# ---- starting and ending ---------------------------------------------------------------------------------------------


def fail_and_begin_again(rank: int, method: str, again: str) -> float:
    threads = set(threading.enumerate())
    with pytest.raises(errors.RendezvousError):
        rpc.init_rpc(
            "alone", rank=0, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(init_method=method, rpc_timeout=2)
        )
    failed = time.monotonic()
    with pytest.raises(errors.NotInitializedError):
        rpc.shutdown()
    took_s = time.monotonic() - failed
    left = [thread.name for thread in threading.enumerate() if thread not in threads and "zrpc" in thread.name]
    assert left == [], "a failed init_rpc leaves threads behind"
    rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=rpc.RpcBackendOptions(init_method=again))
    assert rpc.rpc_sync("alone", double, args=(2,)) == 4
    rpc.shutdown()
    return took_s


def test_a_failed_init_leaves_nothing_that_hangs(cluster_in_each_mode: Cluster) -> None:
    """pytorch#183568. That the process exits afterwards is seen by the harness."""
    cluster = cluster_in_each_mode
    method, again = cluster.new_init_method(), cluster.new_init_method()
    if method == again:  # a file's name is made of how many runs there were
        again += ".again"
    (took_s,) = cluster.run(fail_and_begin_again, 1, args=(method, again), init=False, timeout_s=30)
    assert took_s < PROMPT_S


LEAVER = """
import sys, time, torch, zrpc
rank, method = int(sys.argv[1]), sys.argv[2]
options = zrpc.RpcBackendOptions(init_method=method)
zrpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
kept = zrpc.remote(1 - rank, torch.add, args=(torch.ones(3), 1))
print(kept.to_here().tolist())
sys.stdout.flush()
sys.stdin.readline()  # until both are here: who ends takes the other's value with it
under_way = zrpc.rpc_async(1 - rank, time.sleep, args=(60,))
print(f"end={time.time()}", flush=True)
"""


def test_exit_without_shutdown_is_clean_and_prompt(tmp_path: Path) -> None:
    """#136726. With a reference that is still held and a call that is still under way."""
    command = [sys.executable, "-c", LEAVER]
    processes = [
        subprocess.Popen(
            [*command, str(rank), f"file://{tmp_path}/store"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        values = [process.stdout.readline() for process in processes if process.stdout]
        for process in processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has failed, and said why
                print("go on", file=process.stdin, flush=True)
        said = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    ended = time.time()
    assert values == ["[2.0, 2.0, 2.0]\n"] * 2, said
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
        assert not any(word in err for word in ("core dumped", "Aborted", "Fatal", "terminate called")), err
        assert ended - float(out.rsplit("end=", 1)[1]) < 2 * PROMPT_S


def call_the_next(rank: int) -> int:
    return rpc.rpc_sync(f"worker{(rank + 1) % MANY}", double, args=(rank,))


def test_forty_workers_start(cluster: Cluster) -> None:
    """pytorch#85607, tensorpipe#460."""
    started = time.monotonic()
    assert cluster.run(call_the_next, MANY, timeout_s=60) == [2 * rank for rank in range(MANY)]
    assert time.monotonic() - started < 60


def listening(rank: int) -> list[int]:
    """The TCP ports on which this process listens while it is a worker that calls and is called."""
    assert rpc.rpc_sync(f"worker{1 - rank}", double, args=(1,)) == 2
    return [
        connection.laddr.port
        for connection in psutil.Process().net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_with_a_broker_workers_listen_nowhere(broker_cluster: Cluster) -> None:
    """#44544: the broker's port is the only one."""
    assert broker_cluster.run(listening, 2) == [[], []]


def listening_hosts(rank: int, method: str) -> set[str]:
    os.environ["ZRPC_BIND"] = "tcp://127.0.0.2:0"
    rpc.init_rpc(
        f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(init_method=method)
    )
    assert rpc.rpc_sync(f"worker{1 - rank}", double, args=(1,)) == 2
    connections = psutil.Process().net_connections(kind="inet")
    hosts = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    rpc.shutdown()
    return hosts


def test_workers_listen_where_they_are_told_and_nowhere_else(cluster: Cluster) -> None:
    """#130621."""
    method = cluster.new_init_method()
    assert cluster.run(listening_hosts, 2, args=(method,), init=False) == [{"127.0.0.2"}] * 2


# ---- threads, futures ------------------------------------------------------------------------------------------------

_released = threading.Event()


def wait_for_release() -> str:
    assert _released.wait(PATIENCE_S)
    return "released"


def release() -> None:
    _released.set()


def wait_and_go_on(rank: int) -> list[str]:
    to = f"worker{1 - rank}"
    outcomes: list[str] = []
    future = rpc.rpc_async(to, wait_for_release)
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        outcomes.append(future.wait())

    def call_and_wait() -> None:
        waiting.set()
        outcomes.append(rpc.rpc_sync(to, wait_for_release))

    threads = [threading.Thread(target=target) for target in (wait, wait, call_and_wait)]
    for thread in threads:
        thread.start()
    assert waiting.wait(PATIENCE_S)
    assert [rpc.rpc_sync(to, double, args=(n,)) for n in range(20)] == [2 * n for n in range(20)]
    assert outcomes == [], "they were to wait while others call"
    rpc.rpc_sync(to, release)
    for thread in threads:
        thread.join(PATIENCE_S)
    return outcomes


def test_waiting_in_one_thread_does_not_block_others(cluster_in_each_mode: Cluster) -> None:
    """#96036."""
    assert cluster_in_each_mode.run(wait_and_go_on, 2) == [["released"] * 3] * 2


class Records(logging.Handler):
    """Keeps what is logged, and tells of the first failure that nobody asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.told = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "nobody asked" in record.getMessage():
            self.texts.append(record.getMessage())
            self.told.set()


def drop_failures(rank: int) -> list[str]:
    records = Records()
    logging.getLogger("zrpc").addHandler(records)
    to = f"worker{1 - rank}"
    for ask in (lambda future: future.wait(), lambda future: torch.futures.wait_all([future])):
        with pytest.raises(ValueError, match="asked about"):
            ask(rpc.rpc_async(to, boom, args=("asked about",)))
    gc.collect()
    assert records.texts == []
    rpc.rpc_async(to, boom, args=("dropped",))
    assert records.told.wait(PATIENCE_S), "the failure of a future that nobody waits for is silent"
    return records.texts


def test_a_failure_that_nobody_waits_for_is_not_silent(cluster: Cluster) -> None:
    """#46653."""
    for texts in cluster.run(drop_failures, 2):
        (text,) = texts
        assert text.startswith("PythonCall to ")
        assert "failed, and nobody asked for its outcome: ValueError: dropped" in text
        assert ", in boom" in text, "the remote traceback tells which function it was"


# ---- references ------------------------------------------------------------------------------------------------------


def slow(n: int) -> int:
    assert _released.wait(PATIENCE_S)
    return n


def fetch_without_waiting(rank: int) -> None:
    there, here = f"worker{1 - rank}", f"worker{rank}"

    async def fetch() -> list[int]:
        rrefs = [rpc.remote(to, double, args=(n,)) for n, to in enumerate((there, here) * 5)]
        return list(await asyncio.gather(*(rref.to_here_async() for rref in rrefs)))

    assert asyncio.run(fetch()) == [2 * n for n in range(10)]
    assert rpc.RRef(5).to_here_async().wait() == 5
    for to in (there, here):
        with pytest.raises(ValueError, match="its making failed"):
            rpc.remote(to, boom, args=("its making failed",)).to_here_async().wait()
    made = [rpc.remote(to, slow, args=(7,)) for to in (there, here)]
    futures = [rref.to_here_async() for rref in made]
    for rref in made:
        with pytest.raises(errors.RpcTimeoutError, match="RPC ran for more than"):
            rref.to_here_async(timeout=0.1).wait()
    assert [future.done() for future in futures] == [False, False]
    all_gather(None)
    release()
    assert torch.futures.wait_all(futures) == [7, 7]  # type: ignore[arg-type]  # list is invariant


def test_a_value_is_fetched_without_waiting(cluster: Cluster) -> None:
    """#31461."""
    cluster.run(fetch_without_waiting, 2)


class Node:
    """A value that refers to another worker's."""

    made: weakref.ref[Node] | None = None

    def __init__(self) -> None:
        self.other: Any = None
        Node.made = weakref.ref(self)

    def point_to(self, other: Any) -> None:
        self.other = other


def is_alive() -> bool:
    gc.collect()
    return Node.made is not None and Node.made() is not None


def hold_in_cycles(rank: int) -> None:
    there = f"worker{1 - rank}"
    rref = rpc.remote(there, Node)
    rref.to_here_async().wait()
    cycle = [rref]
    cycle.append(cycle)  # type: ignore[arg-type]
    assert rpc.rpc_sync(there, is_alive)
    all_gather(None)
    del rref, cycle
    gc.collect()
    until(lambda: not rpc.rpc_sync(there, is_alive), "the owner lets go of what was held by a cycle")
    all_gather(None)


def test_references_in_a_cycle_of_objects_are_given_up(cluster: Cluster) -> None:
    """#27096, #30022."""
    cluster.run(hold_in_cycles, 2)


_holding: list[Any] = []


def hold_at_shutdown(rank: int, method: str) -> bool:
    """Two values that refer to each other across workers, and references that nobody drops before shutdown."""
    import zrpc.compat

    zrpc.compat.install()
    import torch.distributed.rpc

    api: Any = torch.distributed.rpc
    api.api._ignore_rref_leak = False
    options = api.TensorPipeRpcBackendOptions(init_method=method)
    api.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    there = f"worker{1 - rank}"
    mine = api.RRef(Node())
    theirs = api.rpc_sync(there, give, args=(mine,))
    mine.local_value().point_to(theirs)
    _holding.extend([theirs, api.remote(there, double, args=(1,))])
    assert is_alive()
    all_gather(None)
    api.shutdown()
    _holding.clear()
    del mine, theirs
    return is_alive()


def give(theirs: Any) -> Any:
    """What this worker made, for what the other has made."""
    mine = rpc.RRef(Node())
    mine.local_value().point_to(theirs)
    return mine


def test_nothing_leaks_at_shutdown(cluster: Cluster) -> None:
    """#30105, #31325: with leaks made errors instead of ignored."""
    assert cluster.run(hold_at_shutdown, 2, args=(cluster.new_init_method(),), init=False) == [False, False]


# ---- dynamic groups --------------------------------------------------------------------------------------------------


def join_dynamic(rank: int, method: str, size: int) -> None:
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=None, rpc_backend_options=options)
    for other in range(size):
        until(lambda: is_member(f"worker{other}"), f"worker{other} is there")  # noqa: B023  # called at once


def gather_in_a_dynamic_group(rank: int, method: str) -> dict[str, int]:
    join_dynamic(rank, method, 3)
    gathered: dict[str, int] = all_gather(rank * 10)
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    with rpc.autograd.context() as context:
        loss = rpc.rpc_sync(f"worker{(rank + 1) % 3}", torch.mul, args=(x, x)).sum()
        rpc.autograd.backward(context, [loss])
        assert torch.equal(rpc.autograd.get_gradients(context)[x], 2 * x.detach())
    all_gather(None)
    rpc.shutdown()
    return gathered


def test_gathering_and_autograd_in_a_dynamic_group(cluster_in_each_mode: Cluster) -> None:
    """#106851, #71571."""
    cluster = cluster_in_each_mode
    everybody = {"worker0": 0, "worker1": 10, "worker2": 20}
    method = cluster.new_init_method()
    assert cluster.run(gather_in_a_dynamic_group, 3, args=(method,), init=False) == [everybody] * 3


def go_on_without_rank_0(rank: int, method: str) -> None:
    join_dynamic(rank, method, 3)
    all_gather(None)
    if rank > 0:
        until(lambda: not is_member("worker0"), "worker0 is gone")
        assert rpc.rpc_sync(f"worker{3 - rank}", double, args=(rank,)) == 2 * rank
        all_gather(None)
    rpc.shutdown()


def test_with_a_broker_nobody_needs_rank_0(broker_cluster: Cluster) -> None:
    """#71571."""
    broker_cluster.run(go_on_without_rank_0, 3, args=(broker_cluster.new_init_method(),), init=False)
