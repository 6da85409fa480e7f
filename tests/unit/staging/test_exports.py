"""Device memory that another worker copies from: every byte is the one that was meant, and nothing is kept for ever."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.logs import handled_by
from tests.unit.staging.fake import SCRIBBLE, FakeAccelerator, on_device
from tests.unit.wire.travel import received
from zrpc import finalizers
from zrpc.errors import DeviceError, ProtocolError
from zrpc.staging import export_slab, exports, handover
from zrpc.staging.export_slab import room_for
from zrpc.staging.note import NOTE_NBYTES
from zrpc.staging.process import Process
from zrpc.staging.stager import Staging
from zrpc.transport import slabs
from zrpc.transport.attachments import Attachments
from zrpc.transport.note import Note
from zrpc.wire.envelope import Envelope, Exported, decode, encode
from zrpc.wire.messages import Reply
from zrpc.wire.payload import Payload, open_payload, seal
from zrpc.wire.route import Route
from zrpc.wire.tensors import EXPORTED, PLACED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")

A, B = b"A" * 8, b"B" * 8
WAIT_S = 10.0
MIN_NBYTES = 500
ROOM_MIN_NBYTES = 4096
PEER_MAX_NBYTES = 40_000
SIZES = [77, 600, 5000, 9000, 17_000]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(exports, "MIN_NBYTES", MIN_NBYTES)
    monkeypatch.setattr(exports, "PEER_MAX_NBYTES", PEER_MAX_NBYTES)
    monkeypatch.setattr(export_slab, "ROOM_MIN_NBYTES", ROOM_MIN_NBYTES)
    yield
    handover.order_by(None)


class FakeProcess:
    """A receiver's process."""

    is_over = False

    def has_ended(self, within_s: float = 0.0) -> bool:
        return self.is_over


class Pair:
    """A sender and a receiver of one host: `cuda:0` of the one is mapped to `target` of the other."""

    def __init__(
        self, sender: FakeAccelerator, receiver: FakeAccelerator, make_note: Callable[[int], Any] = Note
    ) -> None:
        self.a, self.b = sender, receiver
        self.tasks: list[Callable[[], None]] = []
        self.attachments = Attachments()
        self.sender = self._staging(sender)
        self.receiver = self._staging(receiver)
        self.process = FakeProcess()
        self.notes: list[Any] = []

        def note() -> Any:
            self.notes.append(make_note(NOTE_NBYTES))
            return self.notes[-1]

        exporter = self.sender.exporter(B, "b", note, lambda: self.process)  # type: ignore[arg-type,return-value]
        self.route = Route({"cuda:0": "cuda:0"}, self.sender, "Request", "b", exporter)

    def _staging(self, accelerator: FakeAccelerator) -> Staging:
        made = Staging(
            lambda: accelerator, 1 << 20, self.tasks.append, nullcontext, True, beside=self.attachments.beside
        )
        made.use(["cuda:0"])
        return made

    def seal(self, *tensors: torch.Tensor) -> Envelope:
        return seal(Reply(), 1, Payload(tensors=list(tensors)), None, self.route)

    @staticmethod
    def send(envelope: Envelope) -> list[Buffer]:
        """What arrives of it."""
        frames = received(encode(envelope))
        for buffer in envelope.buffers:
            if isinstance(buffer, Exported):
                buffer.has_left()
        return frames

    def decode(self, frames: list[Buffer]) -> Envelope:
        return decode(frames, lambda descriptor: self.attachments.fetch(A, descriptor, []))

    def open(self, frames: list[Buffer]) -> list[torch.Tensor]:
        return open_payload(self.decode(frames), self.receiver).tensors

    def travel(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Send them, and wait until the receiver holds nothing any more."""
        after = self.open(self.send(self.seal(*map(on_device, tensors))))
        self.settle()
        return after

    def settle(self) -> None:
        """Let everything happen that needs no further message."""
        self.a.finish()
        self.b.finish()
        for _ in range(len(self.tasks)):
            self.tasks.pop(0)()
        self.receiver.drain()

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.sender.counts().items() if name.startswith("ipc_")}

    def close(self) -> None:
        self.attachments.close()
        for staging in (self.sender, self.receiver):
            staging.close(0.0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(FakeAccelerator(0), FakeAccelerator(1))
    yield made
    made.close()


def pattern(nbytes: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return ((np.arange(nbytes) * 7 + seed) % 231).astype(np.uint8)


def kinds(envelope: Envelope) -> list[int]:
    return [entry[0] for entry in envelope.table]


# ---- every byte ----------------------------------------------------------------------------------------------------


def exchange(seed: int, pair: Pair) -> bool:
    """Make tensors on some streams, send them, and look at them at the other side; whether all were right.

    Messages are sent and opened in any order; some never are.
    """
    rng = random.Random(seed)
    here, there = ([one.new_stream("cuda:0") for _ in range(3)] for one in (pair.a, pair.b))
    seen: list[tuple[bytes, bytes]] = []
    sealed: list[tuple[Envelope, Any]] = []
    on_the_way: list[tuple[list[Buffer], Any]] = []

    def make(number: int) -> None:
        content = pattern(rng.choice(SIZES), number)
        with pair.a.running_on([rng.choice(here)]):
            tensor = pair.a.fresh(content.nbytes)
            pointer = tensor.data_ptr()  # a kernel knows its memory, and does not keep it
            pair.a.launch(lambda: ctypes.memmove(pointer, content.ctypes.data, content.nbytes))
            sealed.append((pair.seal(on_device(tensor)), content))

    def look(frames: list[Buffer], content: Any) -> None:
        with pair.b.running_on([rng.choice(there)]):
            (tensor,) = pair.open(frames)
            pointer = tensor.data_ptr()
            pair.b.launch(lambda: seen.append((ctypes.string_at(pointer, content.nbytes), content.tobytes())))

    opened = 0
    for number in range(30):
        make(number)
        while sealed and rng.random() < 0.6:
            envelope, content = sealed.pop(rng.randrange(len(sealed)))
            if rng.random() < 0.9:  # else it never leaves
                on_the_way.append((pair.send(envelope), content))
            del envelope
        while on_the_way and rng.random() < 0.6:
            frames, content = on_the_way.pop(rng.randrange(len(on_the_way)))
            if rng.random() < 0.9:
                look(frames, content)
                opened += 1
            else:  # it is read, and then nobody wants it
                pair.decode(frames)
            del frames
        while pair.tasks and rng.random() < 0.5:
            pair.tasks.pop(0)()
        slabs_nbytes = pair.counts()["ipc_slabs_nbytes"]
        assert slabs_nbytes <= PEER_MAX_NBYTES
    sealed.clear()
    while on_the_way:
        pair.decode(on_the_way.pop()[0])
    pair.settle()
    assert len(seen) == opened
    return all(saw == meant for saw, meant in seen)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30))
def test_what_arrives_is_what_the_producing_stream_made(seed: int) -> None:
    pair = Pair(FakeAccelerator(seed), FakeAccelerator(seed + 1))
    try:
        assert exchange(seed, pair)
        assert pair.counts()["ipc_slabs_held"] == 0
    finally:
        pair.close()


def test_much_of_it_does_not_go_through_the_host() -> None:
    exported = fallbacks = 0
    for seed in range(20):
        pair = Pair(FakeAccelerator(seed), FakeAccelerator(seed + 1))
        assert exchange(seed, pair)
        exported += pair.counts()["ipc_tensors"]
        fallbacks += pair.counts()["ipc_fallbacks"]
        pair.close()
    assert exported > 100
    assert fallbacks > 0


class WithoutWait(FakeAccelerator):
    def wait(self, stream: Any, event: Any) -> None:
        """Forgets to."""


class NeverHeld(Note):
    def is_free(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("sender", "receiver", "note"),
    [
        (WithoutWait, FakeAccelerator, Note), (FakeAccelerator, WithoutWait, Note),
        (FakeAccelerator, FakeAccelerator, NeverHeld),
    ],
    ids=["sender", "receiver", "note"],
)  # fmt: skip
def test_these_tests_would_notice(
    sender: type[FakeAccelerator], receiver: type[FakeAccelerator], note: type[Note]
) -> None:
    right = []
    for seed in range(20):
        pair = Pair(sender(seed), receiver(seed), note)
        right.append(exchange(seed, pair))
        pair.close()
    assert not all(right)


def test_what_arrived_is_the_receivers_own(pair: Pair) -> None:
    tensor = torch.arange(2000)
    pair.travel(tensor)
    envelope = pair.seal(on_device(tensor))
    assert kinds(envelope) == [EXPORTED]
    (after,) = pair.open(pair.send(envelope))
    pair.settle()
    after.zero_()
    assert torch.equal(tensor, torch.arange(2000))
    (again,) = pair.travel(tensor)
    assert not after.any()
    assert torch.equal(again, tensor)


DENSE = torch.randn(40, 50)


@pytest.mark.parametrize(
    "tensor",
    [DENSE, DENSE.t(), DENSE[3:30], DENSE.bfloat16(), torch.randn(20, 20, dtype=torch.complex64).conj(),
     torch._neg_view(torch.randn(300)), torch.randn(300).requires_grad_()],
)  # fmt: skip
def test_tensors_arrive_as_they_were(pair: Pair, tensor: torch.Tensor) -> None:
    pair.travel(DENSE)
    envelope = pair.seal(on_device(tensor))
    assert kinds(envelope) == [EXPORTED]
    (after,) = pair.open(pair.send(envelope))
    pair.settle()
    assert type(after) is torch.Tensor
    assert (after.dtype, after.shape, after.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert (after.requires_grad, after.is_conj(), after.is_neg()) == (
        tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip
    assert torch.equal(after, tensor)


def test_views_of_one_storage_arrive_as_views_of_one(pair: Pair) -> None:
    pair.travel(DENSE)
    first, second = pair.travel(DENSE[:30], DENSE.t())
    assert pair.counts()["ipc_tensors"] == 1
    first.zero_()
    assert not second[:, :30].any()
    assert second[:, 30:].equal(DENSE.t()[:, 30:])


# ---- who can open what ---------------------------------------------------------------------------------------------


def test_memory_is_used_once_its_receiver_has_opened_it(pair: Pair) -> None:
    tensor = torch.arange(2000)
    first, second = pair.seal(on_device(tensor)), pair.seal(on_device(tensor))
    assert kinds(first) == kinds(second) == [PLACED]
    assert [len(first.table[0]), len(second.table[0])] == [4, 3], "one slab is tried at a time"
    for (after,) in [pair.open(pair.send(envelope)) for envelope in (first, second)]:
        pair.settle()
        assert torch.equal(after, tensor)
    assert kinds(pair.seal(on_device(tensor))) == [EXPORTED]
    assert kinds(pair.seal(on_device(tensor[:10]))) == [PLACED], "small ones are not worth it"
    assert pair.counts() == {
        "ipc_tensors": 1, "ipc_nbytes": 16_000, "ipc_fallbacks": 2, "ipc_slabs": 1, "ipc_slabs_held": 0,
        "ipc_slabs_nbytes": 16_384,
    }  # fmt: skip


def test_a_trial_that_came_to_nothing_is_made_again(pair: Pair) -> None:
    tensor = on_device(torch.arange(2000))
    for _ in range(3):
        assert len(pair.seal(tensor).table[0]) == 4, "it is dropped before it leaves"
        pair.send(pair.seal(tensor))
        assert len(pair.seal(tensor).table[0]) == 3, "it has left, and was not opened"
        pair.notes[0].free()
    assert len(pair.notes) == 1


def test_a_receiver_that_cannot_open_memory_gets_all_through_the_host(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.b.import_error = "peer access is not supported between these two devices"
    tensor = torch.arange(2000)
    for _ in range(5):
        assert torch.equal(pair.travel(tensor)[0], tensor)
    finalizers.run_pending()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "b cannot open memory of this worker's cuda:0: tensors go there through the host "
        "(peer access is not supported between these two devices)"
    ]
    assert pair.counts()["ipc_tensors"] == 0
    assert pair.counts()["ipc_fallbacks"] == 5
    assert pair.counts()["ipc_slabs"] == 0, "its memory is given back"
    assert len(pair.a.withdrawn) == 1


def test_memory_that_cannot_be_exported_goes_through_the_host(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.a.export_error = "expandable segments cannot be shared"
    for _ in range(5):
        assert torch.equal(pair.travel(torch.arange(2000))[0], torch.arange(2000))
    finalizers.run_pending()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "device memory cannot be shared for now, tensors go through the host: expandable segments cannot be shared"
    ]
    assert pair.counts()["ipc_fallbacks"] == 5
    assert len(pair.notes) == 1, "it is not tried again"


@pytest.mark.parametrize("reason", ["refused", "not exported"])
def test_nothing_is_logged_under_the_lock_of_the_slabs(pair: Pair, reason: str) -> None:
    """A handler of the log may have another thread ask what was exported, and wait for it."""
    if reason == "refused":
        pair.b.import_error = "peer access is not supported between these two devices"
    else:
        pair.a.export_error = "expandable segments cannot be shared"
    had_to_wait: list[bool] = []

    def handle(_: logging.LogRecord) -> None:
        asks = threading.Thread(target=pair.counts)
        asks.start()
        asks.join(WAIT_S)
        had_to_wait.append(asks.is_alive())

    with handled_by(handle):
        for _ in range(3):
            pair.travel(torch.arange(2000))
        finalizers.run_pending()
    assert had_to_wait == [False]


@pytest.mark.parametrize("what", ["room", "note", "unseen", "process"])
def test_what_is_missing_may_be_there_later(pair: Pair, caplog: pytest.LogCaptureFixture, what: str) -> None:
    exporter: Any = pair.route.exporter
    make_note, room_nbytes = exporter._make_note, pair.a.room_nbytes
    open_process = exporter._open_process

    def fail() -> Any:
        raise OSError(24, "Too many open files")

    if what == "room":
        pair.a.room_nbytes = 10_000
    elif what == "process":
        exporter._open_process = fail
    else:
        exporter._make_note = fail if what == "note" else lambda: None
    tensor = torch.arange(2000)
    for _ in range(5):
        assert torch.equal(pair.travel(tensor)[0], tensor)
    finalizers.run_pending()
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (what != "unseen")
    assert pair.counts()["ipc_slabs"] == 0
    exporter._make_note, pair.a.room_nbytes, exporter._open_process = make_note, room_nbytes, open_process
    for _ in range(exports.PAUSE):
        pair.travel(tensor)
    assert pair.counts()["ipc_tensors"] > 0


def test_memory_that_cannot_be_opened_any_more_is_an_error_once(pair: Pair) -> None:
    tensor = torch.arange(2000)
    pair.travel(tensor)
    frames = pair.send(pair.seal(on_device(tensor)))
    pair.attachments.forget(A)
    pair.receiver.imports.tidy()
    pair.b.import_error = "invalid resource handle"
    with pytest.raises(
        DeviceError, match="another worker's device cannot be opened for cuda:0: invalid resource handle"
    ):
        pair.open(frames)
    del frames
    for _ in range(3):
        assert torch.equal(pair.travel(tensor)[0], tensor)
    assert pair.counts()["ipc_tensors"] == 1


def test_damaged_messages_are_refused(pair: Pair) -> None:
    tensor = torch.arange(2000)
    pair.travel(tensor)
    for nbytes in (0, -1, 16_385):
        envelope = pair.seal(on_device(tensor))
        envelope.table[0][3] = nbytes  # type: ignore[index]
        with pytest.raises(ProtocolError, match="bytes were sent in"):
            pair.open(pair.send(envelope))
        del envelope
        pair.settle()
    for content in (b"no note", bytes(5000), bytearray(b"\xff" * 5000)):
        envelope = pair.seal(on_device(tensor[:10]))
        envelope.table[0][0] = EXPORTED  # type: ignore[index]
        envelope.table[0].append(80)  # type: ignore[index]
        envelope.buffers = [content]
        with pytest.raises(ProtocolError):
            pair.open(pair.send(envelope))


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "room"), [(1, 4096), (4096, 4096), (4097, 5120), (8192, 8192), (8193, 10_240), (40_000, 40_960)]
)
def test_rooms_are_four_steps_between_powers_of_two(nbytes: int, room: int) -> None:
    assert room_for(nbytes) == room


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 50_000), st.booleans()), max_size=25), st.integers(0, 1000))
def test_slabs_are_bounded_and_never_used_while_held(steps: list[tuple[int, bool]], seed: int) -> None:
    pair = Pair(FakeAccelerator(seed), FakeAccelerator(seed))
    held: list[tuple[SlabView, int]] = []
    try:
        for mark, (nbytes, is_kept) in enumerate(steps):
            tensor = torch.full((nbytes,), mark, dtype=torch.uint8)
            envelope = pair.seal(on_device(tensor))
            if kinds(envelope) == [EXPORTED] and is_kept:
                slab = envelope.buffers[0]._slab  # type: ignore[union-attr]
                pair.send(envelope)
                slab.note.hold()  # nobody has opened it: what came was dropped
                held.append((slab, mark))
            else:
                pair.open(pair.send(envelope))
            del envelope
            pair.settle()
            counts = pair.counts()
            assert counts["ipc_slabs_nbytes"] <= PEER_MAX_NBYTES
            assert counts["ipc_slabs_held"] == len(held)
            assert all(int(slab.memory[0]) == its for slab, its in held)
        assert len(pair.notes) - pair.counts()["ipc_slabs"] <= len(pair.a.withdrawn) + len(steps)
    finally:
        pair.close()


SlabView = export_slab.ExportSlab


def test_a_larger_slab_serves_smaller_tensors(pair: Pair) -> None:
    pair.travel(torch.zeros(30_000, dtype=torch.uint8))
    for nbytes in (30_000, 600, 5000, 20_000):
        pair.travel(torch.zeros(nbytes, dtype=torch.uint8))
    assert pair.counts()["ipc_tensors"] == 4
    assert len(pair.notes) == 1


def test_idle_slabs_make_way_for_larger_ones_and_the_receiver_lets_go(pair: Pair) -> None:
    for nbytes in (5000, 20_000, 32_000):
        for _ in range(2):
            pair.travel(torch.zeros(nbytes, dtype=torch.uint8))
    assert pair.counts()["ipc_tensors"] == 3
    assert pair.counts()["ipc_slabs"] == 1
    pair.receiver.imports.tidy()
    assert pair.b.num_imported == 1, "the notes of the others are retired"


def test_tensors_that_are_too_large_go_through_the_host(pair: Pair) -> None:
    for _ in range(3):
        pair.travel(torch.zeros(PEER_MAX_NBYTES + 1, dtype=torch.uint8))
    assert pair.notes == []


def test_a_slab_is_given_back_while_its_request_is_served(pair: Pair) -> None:
    tensor = torch.arange(2000)
    pair.travel(tensor)
    payload = open_payload(pair.decode(pair.send(pair.seal(on_device(tensor)))), pair.receiver)
    assert pair.counts()["ipc_slabs_held"] == 1
    pair.settle()
    assert pair.counts()["ipc_slabs_held"] == 0
    assert torch.equal(payload.tensors[0], tensor)


def test_a_message_that_does_not_leave_gives_its_slab_back(pair: Pair) -> None:
    tensor = torch.arange(2000)
    pair.travel(tensor)
    release = pair.a.hold()
    envelope = pair.seal(on_device(tensor))
    assert kinds(envelope) == [EXPORTED]
    assert pair.counts()["ipc_slabs_held"] == 1
    del envelope
    assert pair.counts()["ipc_slabs_held"] == 0
    release()
    other = torch.arange(2000) + 5
    assert torch.equal(pair.travel(other)[0], other), "what was under way is over before it is filled again"
    assert len(pair.notes) == 1


def test_a_device_that_fails_is_an_error_of_the_sender(pair: Pair) -> None:
    tensor = on_device(torch.arange(2000))
    pair.travel(torch.arange(2000))
    pair.a.fails = True
    with pytest.raises(DeviceError, match="16000 bytes cannot be copied within cuda:0: CUDA error"):
        pair.seal(tensor)
    pair.a.fails = False
    assert pair.counts()["ipc_slabs_held"] == 0
    envelope = pair.seal(tensor)
    slab: Any = envelope.buffers[0]

    class Failed:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    slab._slab.filled = Failed()
    with pytest.raises(DeviceError, match="could not be copied within cuda:0: CUDA error"):
        encode(envelope)


# ---- the end of a peer ---------------------------------------------------------------------------------------------


def memory_of(pair: Pair) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The memory of the only slab, for looking at it after the slab is gone."""
    exporter: Any = pair.route.exporter
    (slab,) = exporter._slabs
    block: Any = pair.a._blocks[slab.memory.data_ptr()]
    memory: np.ndarray[Any, np.dtype[np.uint8]] = block.memory
    return memory


def test_what_a_killed_receiver_held_comes_back_when_its_process_has_ended(pair: Pair) -> None:
    tensor = torch.full((2000,), 7, dtype=torch.uint8)
    pair.travel(tensor)
    frames = pair.send(pair.seal(on_device(tensor)))
    memory = memory_of(pair)
    pair.sender.forget(B)
    assert pair.counts()["ipc_slabs_held"] == 1, "that it is lost does not say that it does not read"
    pair.process.is_over = True
    assert pair.counts()["ipc_slabs"] == 0
    assert len(pair.a.withdrawn) == 1, "nobody else counts down for it"
    assert kinds(pair.seal(on_device(tensor))) == [PLACED]
    del frames
    pair.attachments.close()
    pair.receiver.imports.tidy()
    assert set(memory) == {SCRIBBLE}


def test_a_slab_in_the_hands_of_a_sender_is_kept_though_its_receiver_has_died(pair: Pair) -> None:
    tensor = torch.arange(2000)
    pair.travel(tensor)
    release = pair.a.hold()
    envelope = pair.seal(on_device(tensor))
    memory = memory_of(pair)
    pair.process.is_over = True
    pair.sender.forget(B)
    assert pair.counts()["ipc_slabs"] == 1
    del envelope
    assert pair.counts()["ipc_slabs"] == 1, "the copy into it is under way"
    release()
    pair.a.finish()
    assert pair.counts()["ipc_slabs"] == 0
    pair.attachments.close()
    pair.receiver.imports.tidy()
    assert set(memory) == {SCRIBBLE}, "and nothing was copied into it afterwards"


HOLD = """
import sys
from zrpc.transport.attachments import Attachments
held = Attachments().fetch(b"A" * 8, [int(part) for part in sys.argv[1:]], [])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system does not tell when a process ends")
def test_a_real_process_that_is_killed_holds_nothing(pair: Pair) -> None:
    pair.travel(torch.arange(2000))
    envelope = pair.seal(on_device(torch.arange(2000)))
    pair.send(envelope)
    note = pair.notes[0]
    command = [sys.executable, "-c", HOLD, *map(str, note.descriptor)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        exporter: Any = pair.route.exporter
        exporter._process = Process(child.pid)
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        pair.sender.forget(B)
        for _ in range(2):
            pair.tasks.pop()()  # it looks for the end of the process
        assert pair.counts()["ipc_slabs_held"] == 1
        child.kill()
        while pair.tasks:
            pair.tasks.pop()()
        assert pair.counts()["ipc_slabs"] == 0
        assert not note.is_free(), "nobody gave it back"
    assert len(pair.a.withdrawn) == 1


def test_a_lost_receiver_that_lives_may_read_on(pair: Pair) -> None:
    tensor = torch.full((2000,), 7, dtype=torch.uint8)
    pair.travel(tensor)
    frames = pair.send(pair.seal(on_device(tensor)))
    memory = memory_of(pair)
    pair.sender.forget(B)
    release = pair.b.hold()
    with pair.b.running_on([pair.b.new_stream("cuda:0")]):
        (after,) = pair.open(frames)
    del frames
    assert pair.counts()["ipc_slabs_held"] == 1
    release()
    pair.settle()
    assert torch.equal(after, tensor)
    assert pair.counts()["ipc_slabs"] == 0
    assert set(memory[:2000]) == {7}, "it has the memory open yet"
    pair.attachments.forget(A)
    pair.receiver.imports.tidy()
    assert set(memory) == {SCRIBBLE}


def test_a_lost_receiver_is_seen_off_by_a_task(pair: Pair) -> None:
    pair.travel(torch.arange(2000))
    pair.sender.forget(B)
    assert len(pair.tasks) == 1
    pair.tasks.pop()()
    assert len(pair.tasks) == 1, "it has the memory open, and lives: it is looked for again"
    pair.process.is_over = True
    pair.tasks.pop()()
    assert pair.tasks == []
    assert len(pair.a.withdrawn) == 1


def test_closing_waits_for_receivers_but_not_for_ever(pair: Pair) -> None:
    pair.travel(torch.arange(2000))
    pair.send(pair.seal(on_device(torch.arange(2000))))
    pair.notes[0].hold()
    pair.sender.close(0.05)
    pair.sender.close(0.05)
    assert pair.counts()["ipc_slabs"] == 0
    assert kinds(pair.seal(on_device(torch.arange(2000)))) == [PLACED]


def test_without_the_option_nothing_is_exported() -> None:
    staging = Staging(FakeAccelerator, 1 << 20, lambda task: None, nullcontext)
    staging.use(["cuda:0"])
    assert staging.exporter(B, "b", lambda: Note(NOTE_NBYTES), FakeProcess) is None  # type: ignore[arg-type]
    staging.forget(B)
    assert not any(name.startswith("ipc_") for name in staging.counts())
    staging.close(0.0)
