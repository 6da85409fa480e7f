"""Device memory of other workers that this one has opened, to copy from.

It is opened once for each note and kept beside the mapping of the note, so it goes when the sender has let go of that
memory, or is lost. To let go of it is to call the driver, and it may happen anywhere (a message that comes maps a slab,
and unmaps what is retired): so it is only put into a queue there, and done by `tidy` on a thread that may wait.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from zrpc import interrupts
from zrpc.errors import DeviceError, ProtocolError
from zrpc.staging.note import Answer, answer, read_ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from zrpc.staging.accelerator import Accelerator
    from zrpc.wire.envelope import Buffer

    Dropped = deque[tuple[str, torch.Tensor]]
    Beside = Callable[[Buffer, Callable[[], "Import"]], "Import"]


class Import:
    """Memory of another process. Whoever still copies from it holds it.

    Attributes:
        memory: uint8, on a device of this worker as far as torch is concerned.
    """

    __slots__ = ("_device", "_dropped", "memory")

    def __init__(self, memory: torch.Tensor, device: str, dropped: Dropped) -> None:
        self.memory = memory
        self._device = device
        self._dropped = dropped

    @interrupts.uninterrupted
    def __del__(self) -> None:
        self._dropped.append((self._device, self.memory))


class Imports:
    """Any thread may call it.

    Args:
        accelerator: gives the devices.
        submit: runs a task on another thread, unless the worker is closed.
        beside: keeps what is made for a note as long as the note is of use; see `zrpc.transport.attachments`.
    """

    def __init__(
        self, accelerator: Callable[[], Accelerator], submit: Callable[[Callable[[], None]], None], beside: Beside
    ) -> None:
        self._accelerator = accelerator
        self._submit = submit
        self._dropped: Dropped = deque()
        self._beside = beside

    def try_to_open(self, note: Buffer, device: str) -> None:
        """See `zrpc.wire.route.Stager.try_import`."""
        try:
            self._open(note, device)
        except ProtocolError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            answer(note, Answer.REFUSED, str(error))
        else:
            answer(note, Answer.OPENED)

    def open(self, note: Buffer, device: str) -> Import:
        """What `note` tells of, for copies to `device`.

        Raises:
            ProtocolError: it is no note.
            DeviceError: the memory cannot be opened here. Its sender is told.
        """
        try:
            return self._open(note, device)
        except ProtocolError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            answer(note, Answer.REFUSED, str(error))
            raise DeviceError(f"memory of another worker's device cannot be opened for {device}: {error}") from error

    def tidy(self) -> None:
        """Let go of what is of no use any more."""
        while self._dropped:
            try:
                device, memory = self._dropped.popleft()
            except IndexError:
                return
            accelerator = self._accelerator()
            stream = accelerator.new_stream(device)
            with accelerator.running_on([stream]):  # the driver waits for the current stream
                del memory

    def tidy_soon(self) -> None:
        """The same, on another thread, if there is anything."""
        if self._dropped:
            self._submit(self.tidy)

    def _open(self, note: Buffer, device: str) -> Import:
        self.tidy_soon()
        return self._beside(note, partial(self._make, note, device))

    def _make(self, note: Buffer, device: str) -> Import:
        return Import(self._accelerator().import_memory(read_ticket(note), device), device, self._dropped)


def keep_nothing(_: Buffer, make: Callable[[], Import]) -> Import:
    """Nothing is kept."""
    return make()
