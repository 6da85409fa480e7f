"""The sums of a context on (fake) devices: whichever thread adds and whichever reads, on whatever streams."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.unit.staging.fake import FakeAccelerator
from zrpc.autograd.dist_context import DistAutogradContext
from zrpc.autograd.functions import RecvInfo
from zrpc.autograd.service import AutogradService
from zrpc.ids import GlobalId, WorkerInfo
from zrpc.membership.group import Member
from zrpc.staging import handover
from zrpc.staging.streams import Streams
from zrpc.wire.route import Route

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=range(20))
def accelerator(request: pytest.FixtureRequest) -> Iterator[FakeAccelerator]:
    made = FakeAccelerator(request.param)
    handover.order_by(Streams(made, ["cuda:0"]))
    yield made
    handover.order_by(None)


def gradient(accelerator: FakeAccelerator, value: int) -> torch.Tensor:
    """A gradient that a kernel of the current stream will make."""
    made = torch.zeros(100, dtype=torch.uint8)
    target = made.data_ptr()
    accelerator.launch(lambda: ctypes.memset(target, value, 100))
    return made


def look(accelerator: FakeAccelerator, tensor: torch.Tensor) -> set[int]:
    """What a kernel of the current stream sees."""
    seen: list[bytes] = []
    source = tensor.data_ptr()
    accelerator.launch(lambda: seen.append(ctypes.string_at(source, 100)))
    accelerator.finish()
    return set(seen[0])


def test_who_reads_sees_what_others_added(accelerator: FakeAccelerator) -> None:
    context = DistAutogradContext(1)
    leaf = torch.zeros(100, dtype=torch.float32)

    def add() -> None:
        with accelerator.running_on([accelerator.new_stream("cuda:0")]):
            context.set_gradient(leaf, gradient(accelerator, 7))

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    with accelerator.running_on([accelerator.new_stream("cuda:0")]):
        assert look(accelerator, context.gradients()[leaf]) == {7}
        found = context.gradient(leaf)
        assert found is not None
        assert look(accelerator, found) == {7}


class TwoMaps:
    """As much of an agent as it takes to ask for routes: to rank 1 by other maps each way, to rank 2 by one."""

    def __init__(self) -> None:
        self.members = self

    def by_incarnation(self, life: bytes) -> Member:
        return Member(WorkerInfo(f"worker{life[0]}", life[0]), life)

    def routes(self, to: WorkerInfo) -> Any:
        class Routes:
            requests = Route({"cuda:0": "cuda:1"})
            replies = Route({"cuda:0": "cuda:1" if to.id == 2 else "cuda:0"})

        return Routes


@pytest.mark.parametrize(("rank", "expected"), [(1, False), (2, True)])
def test_gradients_ride_on_answers_where_the_device_map_is_the_right_one(rank: int, expected: bool) -> None:
    agent: Any = TwoMaps()
    service = AutogradService(agent)
    assert service.may_answer_with(RecvInfo(bytes([rank]), GlobalId(0, 0), by_answer=True)) is expected
