"""Calls with tensors on devices, between agents whose devices are fakes that run in random order."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.unit.agent.network import WAIT_S, Network, Worker
from tests.unit.staging.fake import on_device
from zrpc.agent.future import Future, future_of, settle
from zrpc.errors import DeviceError, RpcTimeoutError, SerializationError
from zrpc.rref.cell import Cell
from zrpc.staging import handover
from zrpc.wire import pickling
from zrpc.wire.messages import PythonCall
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.unit.staging.fake import FakeAccelerator
    from zrpc.agent.request import Request

LARGE = 300_000


@contextmanager
def two(network: Network | None = None) -> Iterator[tuple[Worker, Worker]]:
    """Workers `a` and `b`, whose `cuda:0` are mapped to each other by `a`."""
    net = network or Network()
    a, b = Worker(net, "a", 0), Worker(net, "b", 1)
    members = [
        a.member(device_count=1, device_maps={"b": {"cuda:0": "cuda:0"}}),
        b.member(device_count=1),
    ]
    try:
        for worker in (a, b):
            worker.join(members, 2)
            worker.agent.open()
        handover.order_by(a.agent.staging.streams)  # a process is one worker, and this one is two
        yield a, b
    finally:
        a.agent.close(5.0)
        b.agent.close(5.0)
    assert handover.streams is None


def fill(accelerator: FakeAccelerator, tensor: torch.Tensor, value: int) -> None:
    """Have the current stream fill `tensor`, some time."""
    target, nbytes = tensor.data_ptr(), tensor.nbytes
    accelerator.launch(lambda: ctypes.memset(target, value, nbytes))


def call(a: Worker, b: Worker, tensor: torch.Tensor, **kwargs: Any) -> Any:
    """Send a tensor; the call."""
    return a.agent.request(b.info, PythonCall(False), Payload(b"", [tensor]), **kwargs)


def serve(b: Worker, answer: Callable[[Request[PythonCall], torch.Tensor], None]) -> None:
    """From now on `b` serves calls so: with the tensor that came, as one of a device."""
    b.agent.handle(PythonCall, lambda request: answer(request, request.payload.tensors[0]), inline=False)


def add_one(b: Worker, request: Request[PythonCall], tensor: torch.Tensor) -> None:
    """Answer with `tensor + 1`, made by a kernel."""
    result = b.accelerator.fresh(tensor.nbytes)
    source, target, nbytes = tensor.data_ptr(), result.data_ptr(), tensor.nbytes

    def kernel() -> None:
        raw = bytearray(ctypes.string_at(source, nbytes))
        ctypes.memmove(target, bytes(byte + 1 for byte in raw[:1]) * nbytes, nbytes)

    b.accelerator.launch(kernel)
    request.reply(Payload(b"", [on_device(result)]))


def value_of(a: Worker, payload: Payload) -> set[int]:
    """What a kernel of the current stream sees in the tensor that came."""
    tensor = payload.tensors[0]
    seen: list[bytes] = []
    source, nbytes = tensor.data_ptr(), tensor.nbytes
    a.accelerator.launch(lambda: seen.append(ctypes.string_at(source, nbytes)))
    a.accelerator.finish()
    return set(seen[0])


@pytest.mark.parametrize("waited", [True, False])
@pytest.mark.parametrize("nbytes", [10, LARGE])
def test_tensors_go_to_a_device_and_back_in_the_order_of_streams(waited: bool, nbytes: int) -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        for value in range(1, 30):
            with a.accelerator.running_on([a.accelerator.new_stream("cuda:0")]):
                tensor = a.accelerator.fresh(nbytes)
                fill(a.accelerator, tensor, value)
                payload = call(a, b, on_device(tensor), waited=waited).wait()
                assert value_of(a, payload) == {value + 1}
        assert a.agent.staging.counts()["pinned_loans"] >= 29
        assert a.agent.staging.counts()["pinned_outside_pool"] == 0


def test_who_does_not_wait_is_not_held_up_by_the_device() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        tensor = a.accelerator.fresh(10)
        release = a.accelerator.hold()
        fill(a.accelerator, tensor, 7)
        slow = call(a, b, on_device(tensor))
        other = a.accelerator.new_stream("cuda:0")
        with a.accelerator.running_on([other]):
            quick = a.accelerator.fresh(10)
            fill(a.accelerator, quick, 1)
            assert value_of_now(a, call(a, b, on_device(quick), timeout_s=WAIT_S).wait()) == {2}
        assert not slow.done(), "its kernel has not run"
        release()
        assert value_of(a, slow.wait()) == {8}


def value_of_now(a: Worker, payload: Payload) -> set[int]:
    """As `value_of`, where other streams are held up."""
    event = a.accelerator.record(a.accelerator.current_stream("cuda:0"))
    event.synchronize()
    return set(payload.tensors[0].tolist())


def test_a_call_that_is_over_before_its_tensor_is_there_changes_nothing_for_the_next() -> None:
    """It may be sent yet, by a stager that waits already; its answer is dropped."""
    with two() as (a, b):
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        release = a.accelerator.hold()
        first = call(a, b, on_device(a.accelerator.fresh(10)), timeout_s=0.05)
        with pytest.raises(RpcTimeoutError):
            first.wait()
        release()
        tensor = a.accelerator.fresh(10)
        fill(a.accelerator, tensor, 7)
        assert value_of(a, call(a, b, on_device(tensor), timeout_s=WAIT_S).wait()) == {8}
        assert a.agent.quiesce(WAIT_S)
        assert b.agent.quiesce(WAIT_S)


def test_a_device_that_is_full_is_an_error_of_the_caller() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: request.reply(Payload(b"", [on_device(tensor)])))
        b.accelerator.room_nbytes = 1000
        with pytest.raises(DeviceError, match=r"2000 bytes that was sent to this worker .* cuda:0: CUDA out of memory"):
            call(a, b, on_device(a.accelerator.fresh(2000))).wait()
        a.accelerator.room_nbytes = 500
        with pytest.raises(DeviceError, match="900 bytes"):
            call(a, b, on_device(torch.zeros(900, dtype=torch.uint8))).wait()
        assert call(a, b, on_device(a.accelerator.fresh(100))).wait().tensors[0].numel() == 100
        assert a.agent.quiesce(WAIT_S)
        assert b.agent.quiesce(WAIT_S)


def test_a_device_that_fails_ends_calls_and_answers() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: request.reply(Payload(b"", [on_device(tensor)])))
        b.accelerator.fails = True
        for _ in range(3):
            with pytest.raises(
                DeviceError, match=r"cannot be copied from cuda:0: CUDA error: an illegal memory access"
            ):
                call(a, b, torch.zeros(3), timeout_s=WAIT_S).wait()
        serve(b, lambda request, tensor: request.reply())
        assert call(a, b, torch.zeros(3), timeout_s=WAIT_S).wait().tensors == [], "who needs no device is served"
        a.accelerator.fails = True
        with pytest.raises(DeviceError, match="cannot be copied from cuda:0"):
            call(a, b, on_device(torch.zeros(3)))
        b.accelerator.fails = a.accelerator.fails = False


def test_a_device_that_fails_while_a_tensor_is_on_its_way_ends_the_call() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        pool = a.agent.staging
        release = a.accelerator.hold()
        under_way = call(a, b, on_device(torch.zeros(40 << 20, dtype=torch.uint8)), timeout_s=WAIT_S)
        a.accelerator.fails = True
        release()
        with pytest.raises(DeviceError, match="could not be copied from its device to the host"):
            under_way.wait()
        a.accelerator.fails = False
        assert pool.counts()["pinned_outside_pool"] == 0


def test_a_device_that_is_not_mapped_is_refused_with_both_names() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: request.reply(Payload(b"", [on_device(tensor)])))
        with pytest.raises(SerializationError, match="Request device mapping is not available for destination b"):
            b.agent.request(b.info, PythonCall(False), Payload(b"", [on_device(torch.ones(1))]))
        with pytest.raises(SerializationError, match="Response device mapping is not available for destination b"):
            b.agent.request(b.info, PythonCall(False), Payload(b"", [on_device(torch.ones(1))]), goes_back=True)
        assert call(a, b, torch.ones(3), timeout_s=WAIT_S).wait().tensors[0].numel() == 3


def test_each_request_has_streams_of_its_own_and_runs_after_those_served_before() -> None:
    with two() as (a, b):
        streams: list[Any] = []
        state = b.accelerator.fresh(1000)

        def step(request: Request[PythonCall], _: torch.Tensor) -> None:
            streams.append(b.accelerator.current_stream("cuda:0"))
            target = state.data_ptr()
            b.accelerator.launch(lambda: ctypes.memset(target, ctypes.string_at(target, 1)[0] + 1, 1000))
            request.reply()

        fill(b.accelerator, state, 0)
        b.accelerator.finish()
        serve(b, step)
        for _ in range(30):
            call(a, b, torch.zeros(1)).wait()
        b.accelerator.finish()
        assert len({stream.number for stream in streams}) == 30
        assert state.eq(30).all()


# ---- values that go from thread to thread --------------------------------------------------------------------------


def elsewhere(accelerator: FakeAccelerator, make: Callable[[], Any]) -> None:
    """Run `make` on another thread, with a stream of its own."""

    def run() -> None:
        with accelerator.running_on([accelerator.new_stream("cuda:0")]):
            make()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def made(accelerator: FakeAccelerator, value: int) -> torch.Tensor:
    tensor = torch.zeros(5000, dtype=torch.uint8)
    fill(accelerator, tensor, value)
    return tensor


def test_a_value_of_a_future_or_a_cell_is_there_for_the_stream_of_who_gets_it() -> None:
    with two() as (a, _):
        for value in range(1, 40):
            future: Future[torch.Tensor] = Future()
            child = future.then(lambda done: done.value())
            cell = Cell()
            elsewhere(a.accelerator, lambda: settle(future, lambda: made(a.accelerator, value)))  # noqa: B023
            elsewhere(a.accelerator, lambda: cell.set_value(made(a.accelerator, value)))  # noqa: B023
            with a.accelerator.running_on([a.accelerator.new_stream("cuda:0")]):
                for get in (future.wait, future.value, child.wait, cell.get, cell.wait):
                    assert value_of(a, Payload(b"", [get()])) == {value}


def test_who_waits_for_a_value_of_a_device_that_failed_is_told() -> None:
    with two() as (a, _):
        future: Future[int] = Future()
        cell = Cell()
        a.accelerator.fails = True
        settle(future, lambda: 1)
        cell.set_value(2)
        a.accelerator.fails = False
        for get in (future.wait, cell.get):
            with pytest.raises(DeviceError, match="cannot be used: CUDA error: an illegal memory access"):
                get()


def test_a_callback_sees_what_its_giver_made_before() -> None:
    with two() as (a, _):
        for value in range(1, 40):
            future: Future[int] = Future()
            with a.accelerator.running_on([a.accelerator.new_stream("cuda:0")]):
                tensor = made(a.accelerator, value)
                child = future.then(lambda _: value_of(a, Payload(b"", [tensor])))  # noqa: B023
            elsewhere(a.accelerator, lambda: settle(future, lambda: 1))  # noqa: B023
            assert child.wait() == {value}


def test_an_answer_that_another_thread_opened_is_there_for_who_asks() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        for value in range(1, 30):
            answered = call(a, b, on_device(made(a.accelerator, value)))
            answered.await_done()
            elsewhere(a.accelerator, lambda: answered.error)  # noqa: B023
            with a.accelerator.running_on([a.accelerator.new_stream("cuda:0")]):
                assert value_of(a, answered.result()) == {value + 1}


def test_an_answer_that_a_completer_opens_is_there_for_who_waits() -> None:
    with two() as (a, b):
        serve(b, lambda request, tensor: add_one(b, request, tensor))
        for value in range(1, 20):
            tensor = made(a.accelerator, value)
            future = future_of(call(a, b, on_device(tensor)), lambda payload: payload, a.agent.completions)
            opened = threading.Event()
            future.add_done_callback(lambda _, opened=opened: opened.set())  # type: ignore[misc]
            assert opened.wait(WAIT_S)
            with a.accelerator.running_on([a.accelerator.new_stream("cuda:0")]):
                assert value_of(a, future.wait()) == {value + 1}


def test_workers_without_devices_open_none() -> None:
    net = Network()
    worker = Worker(net, "a", 0)
    worker.join([worker.member()], 1)
    worker.agent.open()
    try:
        payload = pickling.dumps((pow, (2, 3), {}))
        assert pickling.loads(worker.agent.request(worker.info, PythonCall(False), payload).wait()) == 8
        assert worker.agent.staging.counts() == {}
        assert handover.streams is None
    finally:
        worker.agent.close(5.0)


class SlowToStart(Worker):
    """A worker whose devices are there when the test says so."""

    has_begun = threading.Event()
    may_end = threading.Event()

    def open_accelerator(self) -> FakeAccelerator:
        self.has_begun.set()
        assert self.may_end.wait(WAIT_S)
        return super().open_accelerator()


def test_devices_for_a_newcomer_are_prepared_on_no_thread_that_reads() -> None:
    """A newcomer maps devices: preparing them keeps nothing else waiting, and its requests come after that."""
    net = Network()
    a, b = SlowToStart(net, "a", 0), Worker(net, "b", 1)
    used: list[Sequence[str]] = []

    def answer(request: Request[PythonCall]) -> None:
        used.append(a.agent.staging.devices)
        request.reply()

    try:
        a.join([a.member(device_count=1)], None)
        a.agent.open()
        a.agent.handle(PythonCall, answer, inline=True)
        newcomer = b.member(device_count=1, device_maps={"a": {"cuda:0": "cuda:0"}})
        with ThreadPoolExecutor() as pool:
            pool.submit(a.group.on_joined, newcomer).result(WAIT_S)
        assert a.has_begun.wait(WAIT_S)
        b.join([a.member(device_count=1), newcomer], None)
        b.agent.open()
        b.agent.handle(PythonCall, lambda request: request.reply(), inline=True)
        request = b.agent.request(a.info, PythonCall(False))
        a.agent.request(b.info, PythonCall(False)).wait()  # answers are taken in
        assert not used
        a.may_end.set()
        request.wait()
        assert used == [("cuda:0",)]
    finally:
        a.may_end.set()
        a.agent.close(5.0)
        b.agent.close(5.0)
