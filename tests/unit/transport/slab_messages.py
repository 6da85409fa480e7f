"""What one worker tells another of a slab: the descriptor, and the files that go with the message that names it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from zrpc.transport.packets import OwnedFile
from zrpc.transport.slab import FILE, NO_FILE, NUMBER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.transport.filling import Fill, Unfilled
    from zrpc.transport.slab import Descriptor
    from zrpc.transport.slabs import SlabPool
    from zrpc.wire.envelope import Arriving, Buffer
    from zrpc.wire.region import Region

A, B, C = b"A" * 8, b"B" * 8, b"C" * 8


class Told(NamedTuple):
    """A message about one slab.

    Attributes:
        descriptor: of the slab.
        files: those that go with the message.
    """

    descriptor: Descriptor
    files: Sequence[OwnedFile] = ()

    @property
    def number(self) -> int:
        """Of the slab."""
        number: int = self.descriptor[NUMBER]
        return number

    @property
    def has_file(self) -> bool:
        """Whether the slab's file goes with the message."""
        assert (self.descriptor[FILE] != NO_FILE) == bool(self.files)
        return bool(self.files)


class Places(Protocol):
    """What places buffers: a pool, or all of the shared memory of one worker."""

    def place(
        self, holder: bytes, buffer: Buffer | Arriving | Region, later: list[Fill], files: list[OwnedFile], /
    ) -> Descriptor | None:
        """See `SlabPool.place`."""

    def fill(self, later: Sequence[Fill]) -> None:
        """See `SlabPool.fill`."""


class Fetches(Protocol):
    """What finds the memory that a descriptor tells of: attachments, or all of the shared memory of one worker."""

    def fetch(
        self, source: bytes, descriptor: Descriptor, unfilled: Unfilled, files: Sequence[OwnedFile], /
    ) -> memoryview:
        """See `Attachments.fetch`."""


def begin(sender: Places, raw: Buffer | Arriving, holder: bytes = B) -> tuple[Told, list[Fill]]:
    """Place `raw`, but for what may be done later."""
    later: list[Fill] = []
    files: list[OwnedFile] = []
    descriptor = sender.place(holder, raw, later, files)
    assert descriptor is not None
    return Told(descriptor, files), later


def placed(sender: Places, raw: Buffer | Arriving, holder: bytes = B) -> Told | None:
    """Place `raw` in shared memory, if there is some."""
    later: list[Fill] = []
    files: list[OwnedFile] = []
    descriptor = sender.place(holder, raw, later, files)
    sender.fill(later)
    return None if descriptor is None else Told(descriptor, files)


def place(sender: Places, raw: Buffer | Arriving, holder: bytes = B) -> Told:
    """Place `raw` in shared memory; there is some."""
    told = placed(sender, raw, holder)
    assert told is not None
    return told


def share(sender: SlabPool, raw: Buffer, holders: Sequence[bytes] = (B, C)) -> dict[bytes, Told]:
    """Place `raw` once for all of `holders`, each of which is told of it in a message of its own."""
    descriptors = sender.share(holders, raw)
    assert descriptors is not None
    told = {}
    for holder, descriptor in descriptors.items():
        files: list[OwnedFile] = []
        sender.attach(holder, descriptor, files)
        told[holder] = Told(descriptor, files)
    return told


def copies(files: Sequence[OwnedFile]) -> list[OwnedFile]:
    """The files as they arrive: the receiver's own descriptors of them."""
    return [OwnedFile(os.dup(file.fd)) for file in files]


def fetch(receiver: Fetches, told: Told, source: bytes = A, unfilled: Unfilled | None = None) -> memoryview:
    """The memory that a message of `source` tells of."""
    waiting: Any = [] if unfilled is None else unfilled
    return receiver.fetch(source, told.descriptor, waiting, copies(told.files))
