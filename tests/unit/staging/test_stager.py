"""Staging on fake devices: whatever order streams run in, every byte is the one that was meant."""

from __future__ import annotations

import ctypes
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.unit.staging.fake import FakeAccelerator
from zrpc.errors import DeviceError
from zrpc.staging import handover, outgoing
from zrpc.staging.stager import SMALL_MAX_NBYTES, Staging

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = [1, 77, 4096, 5000, 70_000]
PIECE_NBYTES = 3000

Task = Callable[[], None]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(outgoing, "PIECE_NBYTES", PIECE_NBYTES)
    yield
    handover.order_by(None)


def staging_of(accelerator: FakeAccelerator, pool_nbytes: int = 1 << 20, submit: Any = None, **options: Any) -> Staging:
    made = Staging(lambda: accelerator, pool_nbytes, submit or (lambda task: None), nullcontext, **options)
    made.use(["cuda:0"])
    return made


def pattern(nbytes: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return ((np.arange(nbytes) * 7 + seed) % 251).astype(np.uint8)


def send_some(seed: int, accelerator: FakeAccelerator, pool_nbytes: int) -> bool:
    """Make tensors on some streams, send them, let go of them, and use the memory again; whether all arrived right."""
    rng, staging = random.Random(seed), staging_of(accelerator, pool_nbytes)
    right = True
    waiting: list[tuple[int, int, outgoing.Outgoing]] = []
    streams = [accelerator.new_stream("cuda:0") for _ in range(3)]
    for round_number in range(8):
        with accelerator.running_on([rng.choice(streams)]):
            nbytes = rng.choice(SIZES)
            tensor = accelerator.fresh(nbytes)
            pointer = tensor.data_ptr()  # a kernel knows its memory, and does not keep it
            content = pattern(nbytes, round_number)
            accelerator.launch(lambda p=pointer, c=content: ctypes.memmove(p, c.ctypes.data, c.nbytes))
            waiting.append((round_number, nbytes, staging.fetch(tensor, "cuda:0")))
            del tensor
        rng.shuffle(waiting)
        while waiting and rng.random() < 0.5:
            right &= arrives(*waiting.pop())
    return all([*(arrives(*one) for one in waiting), right])


def arrives(seed: int, nbytes: int, sent: outgoing.Outgoing) -> bool:
    pieces = [bytes(piece) for piece in sent.pieces()]
    assert len(sent) == nbytes == sum(map(len, pieces))
    assert max(map(len, pieces)) <= PIECE_NBYTES
    return b"".join(pieces) == pattern(nbytes, seed).tobytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30), st.sampled_from([0, 8192, 1 << 20]))
def test_what_is_sent_is_what_the_producing_stream_made(seed: int, pool_nbytes: int) -> None:
    assert send_some(seed, FakeAccelerator(seed), pool_nbytes)


class Receiver:
    """Memory that is scribbled over as soon as nobody holds it, as a slab that its sender fills again."""

    def __init__(self) -> None:
        self._references: list[Any] = []

    def lend(self, content: np.ndarray[Any, np.dtype[np.uint8]]) -> memoryview:
        memory = content.copy()
        loan = np.frombuffer(memory.data, np.uint8)

        def scribble(_: object) -> None:
            memory[:] = 255

        self._references.append(weakref.ref(loan, scribble))
        return loan.data


def receive_some(seed: int, accelerator: FakeAccelerator, pool_nbytes: int) -> bool:
    """Receive buffers on some streams, work on them there and let go of them; whether all were right."""
    tasks: list[Task] = []
    rng, receiver = random.Random(seed), Receiver()
    staging = staging_of(accelerator, pool_nbytes, tasks.append)
    streams = [accelerator.new_stream("cuda:0") for _ in range(3)]
    seen: list[tuple[bytes, bytes]] = []
    for round_number in range(8):
        content = pattern(rng.choice([*SIZES, 200_000]), round_number)
        with accelerator.running_on([rng.choice(streams)]):
            tensor = staging.deliver(receiver.lend(content), "cuda:0")
            pointer = tensor.data_ptr()
            accelerator.launch(lambda p=pointer, c=content: seen.append((ctypes.string_at(p, c.nbytes), c.tobytes())))
            del tensor  # the program drops it; the kernel was given already
        if tasks and rng.random() < 0.5:
            tasks.pop(0)()
    staging.drain()
    accelerator.finish()
    assert len(seen) == 8
    assert staging.counts()["staged_buffers_held"] == 0
    return all(saw == meant for saw, meant in seen)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30), st.sampled_from([0, 8192, 1 << 20]))
def test_what_is_received_is_there_when_the_consuming_stream_looks(seed: int, pool_nbytes: int) -> None:
    assert receive_some(seed, FakeAccelerator(seed), pool_nbytes)


class WithoutWait(FakeAccelerator):
    def wait(self, stream: Any, event: Any) -> None:
        """Forgets to."""


class WithoutKeep(FakeAccelerator):
    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Forgets to."""


@pytest.mark.parametrize(
    ("run", "careless"),
    [(send_some, WithoutWait), (receive_some, WithoutWait), (receive_some, WithoutKeep)],
)
def test_these_tests_would_notice(run: Callable[..., bool], careless: type[FakeAccelerator]) -> None:
    assert not all(run(seed, careless(seed), 1 << 20) for seed in range(40))


# ---- errors --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_or_full_is_named() -> None:
    staging = staging_of(FakeAccelerator(room_nbytes=1000))
    with pytest.raises(DeviceError, match=r"2000 bytes .* its cuda:0: CUDA out of memory.*send less at once"):
        staging.deliver(bytes(2000), "cuda:0")
    with pytest.raises(DeviceError, match=r"cuda:3: invalid device ordinal"):
        staging.deliver(bytes(10), "cuda:3")
    with pytest.raises(DeviceError, match=r"10 bytes cannot be copied from cuda:3: invalid device"):
        staging.fetch(torch.zeros(10, dtype=torch.uint8), "cuda:3")
    assert staging.deliver(bytes(10), "cuda:0").numel() == 10, "and others go on"


def test_a_device_that_fails_ends_what_is_under_way() -> None:
    accelerator = FakeAccelerator()
    staging = staging_of(accelerator)
    sent = staging.fetch(torch.zeros(PIECE_NBYTES * 20, dtype=torch.uint8), "cuda:0")
    pieces = sent.pieces()
    next(pieces)
    accelerator.fails = True
    with pytest.raises(DeviceError, match="could not be copied from its device to the host: CUDA error"):
        list(pieces)


def test_without_cuda_it_says_so() -> None:
    def fail() -> Any:
        raise RuntimeError("no driver")

    with pytest.raises(DeviceError, match="CUDA cannot be used in this process: no driver"):
        Staging(fail, 0, lambda task: None, nullcontext).use(["cuda:0"])


# ---- small things --------------------------------------------------------------------------------------------------


def test_nothing_arrives_as_nothing() -> None:
    assert staging_of(FakeAccelerator()).deliver(b"", "cuda:0").numel() == 0


def test_the_memory_of_sockets_is_pinned_where_devices_are_used() -> None:
    accelerator = FakeAccelerator()
    staging = Staging(lambda: accelerator, 1 << 20, lambda task: None, nullcontext)
    assert staging.receive_memory(5000).nbytes == 5000
    assert accelerator.pinned_nbytes == 0, "nothing was opened"
    staging.use(["cuda:0"])
    first, second = staging.receive_memory(300_000), staging.receive_memory(300_000)
    assert (first.nbytes, second.nbytes) == (300_000, 300_000)
    assert staging.counts()["pinned_lent_nbytes"] == 1 << 19, "half of the pool is left for sending"


def test_shared_memory_is_pinned_where_it_is_large_and_waited_for_before_it_is_not() -> None:
    accelerator = FakeAccelerator()
    pinned: list[int] = []
    staging = staging_of(accelerator, pin=lambda buffer: pinned.append(len(buffer)))
    source = memoryview(bytearray(b"\1" * (SMALL_MAX_NBYTES + 1)))
    target = staging.deliver(source, "cuda:0")
    staging.deliver(bytes(SMALL_MAX_NBYTES), "cuda:0")
    assert pinned == [SMALL_MAX_NBYTES + 1]
    assert staging.register(4096, 10)
    staging.unregister(4096)
    assert accelerator.registered == {}
    assert bool(target.eq(1).all()), "the copy from it was waited for"
