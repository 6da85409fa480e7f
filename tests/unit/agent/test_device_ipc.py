"""Calls with tensors that go from device to device, between agents whose devices are fakes that run in random order."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.unit.agent.network import WAIT_S, Network, Worker
from tests.unit.agent.test_devices import LARGE, add_one, call, fill, serve, value_of
from tests.unit.staging.fake import on_device
from tests.waiting import until
from zrpc.config import RpcBackendOptions
from zrpc.errors import PeerLostError
from zrpc.staging import handover
from zrpc.transport import slabs
from zrpc.transport.shared_memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    not slabs.is_supported() or not hasattr(os, "pidfd_open"), reason="this system shares no memory between processes"
)

WANTED = (True, True)


@contextmanager
def two(wanted: tuple[bool, bool] = WANTED) -> Iterator[tuple[Worker, Worker]]:
    """Workers `a` and `b` that share memory, whose `cuda:0` are mapped to each other by `a`; which want `cuda_ipc`."""
    network = Network()
    a, b = (
        Worker(network, name, rank, RpcBackendOptions(num_worker_threads=4, cuda_ipc=is_wanted), SharedMemory())
        for rank, (name, is_wanted) in enumerate(zip("ab", wanted, strict=True))
    )
    card_of = {worker: {"memory": worker.agent.memory_card(), "cuda_ipc": worker.options.cuda_ipc} for worker in (a, b)}
    members = [
        a.member(device_count=1, device_maps={"b": {"cuda:0": "cuda:0"}}, **card_of[a]),
        b.member(device_count=1, **card_of[b]),
    ]
    try:
        for worker in (a, b):
            worker.join(members, 2)
            worker.agent.open()
        handover.order_by(a.agent.staging.streams)  # a process is one worker, and this one is two
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        yield a, b
    finally:
        a.agent.close(5.0)
        b.agent.close(5.0)


def ipc_counts(worker: Worker) -> dict[str, int]:
    return {name: count for name, count in worker.agent.staging.counts().items() if name.startswith("ipc_")}


def settled(a: Worker, b: Worker) -> dict[str, int]:
    """What `ipc_counts` says of `a` once `b`'s device has done all that it was given by now."""
    b.accelerator.finish()
    b.agent.staging.drain()
    return ipc_counts(a)


def add_through(a: Worker, b: Worker, value: int, **kwargs: Any) -> None:
    """Send a tensor of `value`, made on a stream of its own, and see that its answer is one more."""
    with a.accelerator.running_on([a.accelerator.new_stream("cuda:0")]):
        tensor = a.accelerator.fresh(LARGE)
        fill(a.accelerator, tensor, value)
        sent = call(a, b, on_device(tensor), **kwargs)
        assert value_of(a, sent.wait()) == {value + 1}


@pytest.mark.parametrize("waited", [True, False])
def test_after_the_first_calls_tensors_go_from_device_to_device_and_back(waited: bool) -> None:
    with two() as (a, b):
        for value in range(1, 30):
            add_through(a, b, value, waited=waited)
        for worker in (a, b):
            counts = ipc_counts(worker)
            assert counts["ipc_tensors"] + counts["ipc_fallbacks"] == 29
            assert counts["ipc_tensors"] >= 20
            assert counts["ipc_nbytes"] == LARGE * counts["ipc_tensors"]
            assert counts["ipc_slabs"] <= 5


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_both_must_want_it(wanted: tuple[bool, bool]) -> None:
    with two(wanted) as (a, b):
        for value in range(1, 5):
            add_through(a, b, value)
        for worker in (a, b):
            assert not any(ipc_counts(worker).values())


def test_calls_go_on_where_one_side_cannot_open_memory_and_the_other_can() -> None:
    with two() as (a, b):
        b.accelerator.import_error = "the devices have no peer access"
        for value in range(1, 12):
            add_through(a, b, value)
        assert ipc_counts(a)["ipc_tensors"] == 0
        assert ipc_counts(b)["ipc_tensors"] >= 5


def test_calls_to_a_worker_itself_go_through_the_host() -> None:
    with two() as (a, _):
        network_maps = a.agent.routes(a.info)
        assert network_maps.requests.exporter is None


def test_the_slabs_for_a_lost_peer_are_let_go_of_when_it_lets_go() -> None:
    with two() as (a, b):
        for value in range(1, 6):
            add_through(a, b, value)
        assert ipc_counts(a)["ipc_slabs"] > 0
        a.endpoint.lose(b.endpoint.incarnation, "it was killed")
        with pytest.raises(PeerLostError):
            call(a, b, on_device(torch.zeros(LARGE, dtype=torch.uint8)), timeout_s=WAIT_S).wait()
        until(lambda: settled(a, b)["ipc_slabs"] == 0, "no slab is left")
        assert ipc_counts(a)["ipc_slabs_held"] == 0


def test_a_call_that_times_out_before_its_tensor_is_there_holds_no_slab() -> None:
    with two() as (a, b):
        for value in range(1, 6):
            add_through(a, b, value)
        release = a.accelerator.hold()
        late = call(a, b, on_device(a.accelerator.fresh(LARGE)), timeout_s=0.05)
        late.await_done()
        assert late.failed
        release()
        a.accelerator.finish()
        a.agent._stagers.close(WAIT_S)
        until(lambda: settled(a, b)["ipc_slabs_held"] == 0, "no slab is held")
