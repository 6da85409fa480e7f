"""Answers that leave together: all come, and none lies behind a function that does not end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

import zrpc as rpc
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.gather import all_gather
from zrpc.transport.batches import is_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.integration.harness import Cluster
    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

ROUNDS = 20
PATIENCE_S = 30.0

_may_go = threading.Event()
_num_batches = 0


def count_batches() -> None:
    """From now on count what this worker sends."""
    batches = current_agent()._carrier._batches
    send = batches._send

    def counted(peer: Incarnation, frames: Sequence[Buffer]) -> None:
        global _num_batches
        _num_batches += is_batch(frames)
        send(peer, frames)

    batches._send = counted


def num_batches() -> int:
    return _num_batches


def note(n: int) -> int:
    return n


def stay() -> None:
    assert _may_go.wait(PATIENCE_S), "nobody lets it go"
    _may_go.clear()


def let_go() -> None:
    _may_go.set()


def call_many_and_one_that_stays(rank: int) -> int:
    sent = 0
    if rank == 0:
        rpc.rpc_sync("worker1", count_batches)
        for _ in range(ROUNDS):
            before = [rpc.rpc_async("worker1", note, args=(n,)) for n in range(40)]
            staying = rpc.rpc_async("worker1", stay)
            after = [rpc.rpc_async("worker1", note, args=(n,)) for n in range(40)]
            assert [future.wait() for future in before] == list(range(40))
            assert [future.wait() for future in after] == list(range(40))
            rpc.rpc_sync("worker1", let_go)
            staying.wait()
        sent = rpc.rpc_sync("worker1", num_batches)
    all_gather(None)
    return sent


def test_no_answer_lies_behind_a_function_that_stays(cluster_in_each_mode: Cluster) -> None:
    sent, _ = cluster_in_each_mode.run(call_many_and_one_that_stays, 2)
    assert sent > 0, "no queue has formed in all this time"


# ---- what a function answers that goes on ----------------------------------------------------------------------------

_promised: list[torch.futures.Future[str]] = []
_came = threading.Event()
_may_shut_down = threading.Event()


@rpc.functions.async_execution
def promise() -> torch.futures.Future[str]:
    _promised.append(torch.futures.Future())
    return _promised[-1]


def keep_and_stay() -> None:
    """Answer `promise` once another thread reads, and wait for what its caller does with that."""
    inbox = current_agent()._carrier.inbox
    until(lambda: not inbox.is_read_here and "no thread reads" not in inbox.describe(), "another thread reads")
    until(lambda: _promised, "`promise` is served: it may be later, on another thread")
    _promised.pop().set_result("kept")
    assert _came.wait(PATIENCE_S), "the answer lies there"
    _came.clear()


def it_came() -> None:
    _came.set()


def ask_for_a_promise(rank: int) -> None:
    if rank == 0:
        for _ in range(ROUNDS):
            promised = rpc.rpc_async("worker1", promise)
            quick = [rpc.rpc_async("worker1", note, args=(n,)) for n in range(20)]
            staying = rpc.rpc_async("worker1", keep_and_stay)
            assert promised.wait() == "kept"
            rpc.rpc_sync("worker1", it_came)
            staying.wait()
            for future in quick:
                future.wait()
    all_gather(None)


def test_no_answer_lies_behind_the_function_that_gives_it(cluster: Cluster) -> None:
    cluster.run(ask_for_a_promise, 2)


def answer_late() -> str:
    """Answer once this worker shuts down: a reader when nobody reads, as one of a queue; a handler thread at once."""
    agent = current_agent()
    inbox = agent._carrier.inbox
    if inbox.is_reader_here:
        until(inbox._is_over, "this worker reads no more")
        inbox._serves_queue = threading.get_ident()
    else:
        until(lambda: agent._closed, "this worker shuts down")
    return "late"


def may_shut_down() -> None:
    _may_shut_down.set()


def shut_down_before_an_answer(rank: int, init_method: str) -> list[str]:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    late: list[str] = []
    if rank == 0:
        quick = [rpc.rpc_async("worker1", note, args=(n,)) for n in range(20)]
        waiting = rpc.rpc_async("worker1", answer_late)
        for future in quick:
            future.wait()
        rpc.rpc_sync("worker1", may_shut_down)
        late.append(waiting.wait())
    else:
        assert _may_shut_down.wait(PATIENCE_S)
    rpc.shutdown(graceful=False)
    return late


def test_an_answer_that_a_worker_gives_as_it_shuts_down_leaves(cluster: Cluster) -> None:
    late, _ = cluster.run(shut_down_before_an_answer, 2, args=(cluster.new_init_method(),), init=False)
    assert late == ["late"]
