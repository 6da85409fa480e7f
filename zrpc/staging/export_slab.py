"""One slab of device memory that one peer may copy from, and the way of one buffer through it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zrpc import interrupts
from zrpc.errors import DeviceError
from zrpc.staging.note import Answer, answer_in
from zrpc.wire.envelope import Exported

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from zrpc.staging.accelerator import Accelerator, Event
    from zrpc.staging.note import Note

ROOM_MIN_NBYTES = 1 << 20
_STEPS = 4


def room_for(nbytes: int) -> int:
    """The room of the slab that is made for `nbytes`: the next of four steps between two powers of two."""
    step = max(ROOM_MIN_NBYTES, 1 << (nbytes - 1).bit_length()) // (2 * _STEPS)
    return max(ROOM_MIN_NBYTES, -(-nbytes // step) * step)


class ExportSlab:
    """Owned by the lock of its `PeerExports` or, in hand, by the thread that has it; but for what its note says.

    Attributes:
        device: where it is.
        target: the peer's device for which the peer opens it.
        memory: uint8.
        ticket: what the peer needs to open it.
        note: the peer holds the slab while he holds the note.
        filled: behind the last copy into it; None: there was none.
        hands: each `SlabExport` that has it and has not left, by its id; single operations of a set are atomic.
    """

    __slots__ = ("device", "filled", "hands", "memory", "note", "target", "ticket")

    def __init__(self, device: str, target: str, memory: torch.Tensor, ticket: list[Any], note: Note) -> None:
        self.device = device
        self.target = target
        self.memory = memory
        self.ticket = ticket
        self.note = note
        self.filled: Event | None = None
        self.hands: set[int] = set()

    @property
    def room(self) -> int:
        """How many bytes it takes."""
        return self.memory.numel()

    @property
    def answer(self) -> Answer:
        """What the peer says of it."""
        return answer_in(self.note.view)

    def serves(self, device: str, target: str) -> bool:
        """Whether bytes of `device` that go to the peer's `target` may go through it."""
        return self.device == device and self.target == target

    def is_idle(self, is_lost: bool = False) -> bool:
        """Whether it may be let go of: nobody holds it, and no copy into it is under way (of a message not sent).

        torch does not keep memory that was exported until a stream is done with it, so that must be waited for.

        Args:
            is_lost: nobody else can hold it: the peer's process has ended.
        """
        if self.hands or not (is_lost or self.note.is_free()):
            return False
        try:
            return self.filled is None or self.filled.query()
        except RuntimeError:  # the device has failed: it copies nothing any more
            return True

    def await_filled(self) -> None:
        """Wait until no copy into it is under way."""
        if self.filled is not None:
            with suppress(RuntimeError):
                self.filled.synchronize()

    def fill(self, accelerator: Accelerator, source: torch.Tensor) -> None:
        """Begin to copy `source` into it, after all that the current stream of its device has been given.

        Raises:
            RuntimeError: the device does not take the work.
        """
        stream = accelerator.new_stream(self.device)
        accelerator.wait(stream, accelerator.record(accelerator.current_stream(self.device)))
        if self.filled is not None:
            accelerator.wait(stream, self.filled)
        accelerator.keep(source, stream)
        accelerator.copy(self.memory[: source.numel()], source, stream)
        self.filled = accelerator.record(stream)


class SlabExport(Exported):
    """A slab that goes to its peer, with the bytes of one buffer in it, or for the peer to try.

    Args:
        slab: held by nobody else from now on.
        nbytes: how many bytes are in it; 0: it is to be tried.
        waiting: entered while a thread waits for the device.
    """

    def __init__(self, slab: ExportSlab, nbytes: int, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self.nbytes = nbytes
        self._slab = slab
        self._waiting = waiting
        self._has_left = False
        slab.hands.add(id(self))

    def descriptor(self) -> list[Any]:
        """See `Exported.descriptor`."""
        filled = self._slab.filled
        try:
            if self.nbytes and filled is not None and not filled.query():
                with self._waiting():
                    filled.synchronize()
        except RuntimeError as error:
            raise DeviceError(f"a tensor could not be copied within {self._slab.device}: {error}") from error
        return self._slab.note.descriptor

    def has_left(self) -> None:
        """See `Exported.has_left`."""
        self._has_left = True
        self._slab.hands.discard(id(self))

    @interrupts.uninterrupted
    def __del__(self) -> None:
        if not self._has_left:
            self._slab.hands.discard(id(self))
            self._slab.note.free()
