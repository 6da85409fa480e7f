"""What staging needs of devices: the one interface behind which CUDA lies (`zrpc.staging.cuda`), or a test's fake.

Work that is given to a stream runs in the order of that stream, and after the events that the stream was told to wait
for; nothing else orders it. None of the calls waits for a device, except `Event.synchronize`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch

Stream = Any
"""A stream of an accelerator; only the accelerator looks into it."""


class Event(Protocol):
    """A place in the order of a stream."""

    def query(self) -> bool:
        """Whether all that the stream was given before is done."""

    def synchronize(self) -> None:
        """Wait until it is, without the interpreter's lock. Raises RuntimeError if the device has failed."""


class Accelerator(Protocol):
    """The devices of this process, named as `str(torch.device)` does. Any thread may call it."""

    def current_stream(self, device: str) -> Stream:
        """The stream that this thread gives its work on `device` to."""

    def new_stream(self, device: str) -> Stream:
        """A stream of `device` besides the default one; they are few, and given out in turn."""

    def running_on(self, streams: Sequence[Stream]) -> AbstractContextManager[None]:
        """Make each of `streams` the current one of its device, for this thread, while the body runs."""

    def record(self, stream: Stream) -> Event:
        """The place in the order of `stream` behind all that it was given."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What `stream` is given from now on runs after `event`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Have `stream` copy `source` into `target`, one on its device and one on the host.

        Where the host's memory is not pinned it may wait for what `stream` was given before.
        """

    def empty(self, nbytes: int, device: str, stream: Stream) -> torch.Tensor:
        """Fresh uint8 memory of `device`, for use on `stream`.

        Raises:
            RuntimeError: there is no such device, or no room on it.
        """

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        """When `tensor` dies, its memory is not used again before `stream` has done what it was given until then."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Fresh uint8 memory of the host that devices copy from and to by themselves.

        Raises:
            RuntimeError: there is none.
        """

    def register(self, address: int, nbytes: int) -> bool:
        """Pin memory of the host that is there already, in whole pages; false where that does not work."""

    def unregister(self, address: int) -> None:
        """Undo `register`. The memory must still be there, and no copy of it under way."""
