"""Devices without a device: streams are queues of operations that run late, and in random order between streams.

Only the order of a stream, events that it waits for and `synchronize` order anything, as on a GPU; so whatever forgets
to wait reads stale bytes in some of the runs. Device memory is CPU memory that is used again as soon as its tensor
dies, unless `keep` was told of a stream that may still use it; and copies go by address, so they hold nothing alive.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt


class FakeCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on `cuda:0`."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a view of it, as one of `cuda:0`."""
    return tensor.detach().as_subclass(FakeCuda).requires_grad_(tensor.requires_grad)


@dataclass(eq=False)
class FakeStream:
    device: str
    number: int
    queue: deque[Callable[[], bool]] = field(default_factory=deque)
    """Operations; one that returns false cannot run yet."""


class FakeEvent:
    def __init__(self, accelerator: FakeAccelerator) -> None:
        self._accelerator = accelerator
        self.is_done = False

    def query(self) -> bool:
        self._accelerator.drift()
        return self.is_done

    def synchronize(self) -> None:
        self._accelerator.run_until(lambda: self.is_done)


@dataclass(eq=False)
class _Block:
    """Device memory. It may be used again by the stream it was made for once all of `blockers` are done."""

    memory: npt.NDArray[np.uint8]
    used_by: set[FakeStream] = field(default_factory=set)
    blockers: list[FakeEvent] = field(default_factory=list)


class FakeAccelerator:
    """An `Accelerator`. Any thread may call it; the lock owns everything.

    Args:
        seed: of the order in which streams run.
        num_devices: how many devices there are.
        room_nbytes: how much memory each has.

    Attributes:
        pinned_nbytes: how much was pinned by `pinned` so far.
        max_pinned_nbytes: `pinned` fails beyond that.
        registered: what `register` pinned, by its address.
        fails: whether work that is given to a stream from now on is refused.
    """

    def __init__(self, seed: int = 0, num_devices: int = 1, room_nbytes: int = 1 << 30) -> None:
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._released = threading.Condition(self._lock)
        self._num_held = 0
        self._here = threading.local()
        self.room_nbytes = room_nbytes
        self._streams: list[FakeStream] = []
        self._defaults = {f"cuda:{index}": self._stream(f"cuda:{index}") for index in range(num_devices)}
        self._free: defaultdict[tuple[FakeStream, int], list[_Block]] = defaultdict(list)
        self._blocks: dict[int, _Block] = {}
        self._loans: dict[int, weakref.ref[Any]] = {}
        self.pinned_nbytes = 0
        self.max_pinned_nbytes = 1 << 40
        self.registered: dict[int, int] = {}
        self.fails = False

    # ---- Accelerator -----------------------------------------------------------------------------------------------

    def current_stream(self, device: str) -> FakeStream:
        current: FakeStream = self._current().get(device) or self._defaults[device]
        return current

    def new_stream(self, device: str) -> FakeStream:
        if device not in self._defaults:
            raise RuntimeError(f"invalid device ordinal: {device}")
        return self._stream(device)

    @contextmanager
    def running_on(self, streams: Sequence[FakeStream]) -> Iterator[None]:
        before = dict(self._current())
        self._current().update({stream.device: stream for stream in streams})
        try:
            yield
        finally:
            self._here.streams = before

    def record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent(self)

        def happen() -> bool:
            event.is_done = True
            return True

        self._enqueue(stream, happen)
        return event

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self._enqueue(stream, lambda: event.is_done)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        assert target.numel() == source.numel()
        addresses, nbytes = (target.data_ptr(), source.data_ptr()), source.numel()
        self._enqueue(stream, lambda: ctypes.memmove(*addresses, nbytes) is not None)

    def empty(self, nbytes: int, device: str, stream: FakeStream) -> torch.Tensor:
        if device not in self._defaults:
            raise RuntimeError(f"invalid device ordinal: {device}")
        with self._lock:
            if nbytes > self.room_nbytes:
                raise RuntimeError(f"CUDA out of memory. Tried to allocate {nbytes} bytes")
            block = next((b for b in self._free[stream, nbytes] if all(e.is_done for e in b.blockers)), None)
            if block is None:
                block = _Block(np.empty(nbytes, np.uint8))
            else:
                self._free[stream, nbytes].remove(block)
            return self._lend(block, stream)

    def keep(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        block = self._blocks.get(tensor.untyped_storage().data_ptr())
        if block is not None:  # memory of a test's own stays
            block.used_by.add(stream)

    def pinned(self, nbytes: int) -> torch.Tensor:
        if self.pinned_nbytes + nbytes > self.max_pinned_nbytes:
            raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
        self.pinned_nbytes += nbytes
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def register(self, address: int, nbytes: int) -> bool:
        self.registered[address] = nbytes
        return True

    def unregister(self, address: int) -> None:
        del self.registered[address]

    # ---- for tests -------------------------------------------------------------------------------------------------

    def launch(self, kernel: Callable[[], object], device: str = "cuda:0") -> None:
        """Give `kernel` to this thread's current stream."""
        self._enqueue(self.current_stream(device), lambda: kernel() is not self)

    def hold(self) -> Callable[[], None]:
        """Keep this thread's current stream from going on until what is returned is called."""
        gate: list[None] = []

        def release() -> None:
            with self._lock:
                gate.append(None)
                self._num_held -= 1
                self._released.notify_all()

        self._num_held += 1
        self._enqueue(self.current_stream("cuda:0"), lambda: bool(gate))
        return release

    def fresh(self, nbytes: int, device: str = "cuda:0") -> torch.Tensor:
        """Device memory of this thread's current stream, as a program gets it."""
        return self.empty(nbytes, device, self.current_stream(device))

    def drift(self) -> None:
        """Let time pass: some operations run."""
        with self._lock:
            for _ in range(self._random.choice((0, 0, 1, 3))):
                self._step()

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Run operations until `is_over`."""
        while not is_over():
            with self._lock:
                if not is_over() and not self._step():
                    if not self._num_held:
                        raise AssertionError("a thread waits for an event that cannot happen")
                    self._released.wait()

    def finish(self) -> None:
        """Run all that was given to any stream."""
        self.run_until(lambda: not any(stream.queue for stream in self._streams))

    def _step(self) -> bool:
        busy = [stream for stream in self._streams if stream.queue]
        self._random.shuffle(busy)
        for stream in busy:
            if stream.queue[0]():
                stream.queue.popleft()
                return True
        return False

    def _stream(self, device: str) -> FakeStream:
        with self._lock:
            stream = FakeStream(device, len(self._streams))
            self._streams.append(stream)
            return stream

    def _current(self) -> dict[str, FakeStream]:
        if not hasattr(self._here, "streams"):
            self._here.streams = {}
        current: dict[str, FakeStream] = self._here.streams
        return current

    def _enqueue(self, stream: FakeStream, operation: Callable[[], bool]) -> None:
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.drift()
        with self._lock:
            stream.queue.append(operation)

    def _lend(self, block: _Block, stream: FakeStream) -> torch.Tensor:
        block.used_by, block.blockers = set(), []
        if not block.memory.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        loan = np.frombuffer(block.memory.data, np.uint8)
        self._blocks[block.memory.ctypes.data] = block

        def give_back(reference: weakref.ref[Any]) -> None:
            self._loans.pop(id(reference), None)
            fails, self.fails = self.fails, False
            block.blockers = [self.record(user) for user in block.used_by]
            self.fails = fails
            self._free[stream, block.memory.nbytes].append(block)

        reference = weakref.ref(loan, give_back)
        self._loans[id(reference)] = reference
        return torch.frombuffer(loan.data, dtype=torch.uint8)
