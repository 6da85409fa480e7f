"""The slabs of other workers that this one has mapped, and the loans made of them and of own slabs that came home."""

from __future__ import annotations

import errno
import os
import reprlib
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from zrpc import interrupts
from zrpc.errors import LimitError, ProtocolError
from zrpc.transport import descriptors
from zrpc.transport.slab import (
    DESCRIPTOR_LENGTH,
    HANDED_BACK,
    MAX_SLOTS,
    NBYTES,
    NO_FILE,
    NO_SLOT,
    NOBODY,
    NUMBER,
    Descriptor,
    PrivateSlab,
    SlabMemory,
    address_of,
    open_slab,
    size_class,
)
from zrpc.wire.envelope import HandedBack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.filling import Unfilled
    from zrpc.transport.packets import OwnedFile
    from zrpc.transport.slab import Pins
    from zrpc.wire.envelope import Buffer

_Key = tuple[bytes, int, int]
"""Of a slab: its owner's incarnation, number and slot."""
_TOO_MUCH = (errno.ENOMEM, errno.EAGAIN)
"""Of `mmap`: a limit on mappings or address space, and on memory that is locked."""
MAPPED_MAX = 8192
"""Of one owner: twice as many slabs as it may have, as shared ones are mapped once a slot."""
_SHARED = b"shared"
"""In place of the owner of a shared slab: it cannot be handed back."""


class _Loan(NamedTuple):
    """What `lend` has handed out, where it lies, and whose that is by which descriptor."""

    reference: weakref.ref[Any]
    memory: SlabMemory
    owner: Incarnation
    descriptor: Descriptor


class Attachments:
    """What `fetch` hands out is a loan: its slab is free again when nobody sees it any more.

    The table of slabs is owned by the lock. Loans are entered and taken out by single dict operations, which are
    atomic: one may die anywhere, inside a garbage collection too. `hand_back` takes one out that its message holds, and
    puts it in again if it did not die then. Of a death it may be told late, when the slab is lent anew already: so each
    takes out itself alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[_Key, SlabMemory] = {}
        self._loans: dict[int, _Loan] = {}  # by the address, nobody else's while it lives

    def fetch(
        self, source: Incarnation, descriptor: Descriptor, unfilled: Unfilled, files: Sequence[OwnedFile | None] = ()
    ) -> memoryview:
        """The memory that `descriptor` of the worker `source` tells of; free again once nobody sees it any more.

        `unfilled` gets the slab if it is not whole yet. `files` came with the message; None: one could not be opened.

        Raises:
            ProtocolError: the slab is not there, it is smaller, or in use here already.
            LimitError: this process may not open its file, or not map it.
        """
        if [type(part) for part in descriptor] != [int] * DESCRIPTOR_LENGTH:
            raise ProtocolError(f"{reprlib.repr(descriptor)} describes no slab")
        number, nbytes, slot, file = descriptor
        if slot != NO_SLOT and not 0 <= slot < MAX_SLOTS:
            raise ProtocolError(f"a shared slab of {source.hex()} has no slot {slot}")
        memory = self._map(source, number, slot, files[file : file + 1] if file >= 0 else ())
        if not 0 < nbytes <= memory.room:
            raise ProtocolError(f"a slab of {source.hex()} has no room for {nbytes} bytes")
        known = self._loans.get(memory.address)
        if known is not None and known.reference() is not None:  # two tensors would be one, and freed with the first
            raise ProtocolError(f"a slab of {source.hex()} came twice, and is in use")
        if isinstance(memory, PrivateSlab):
            memory.renew()
            return self.lend(memory, _SHARED, descriptor, unfilled)
        return self.lend(memory, source, descriptor, unfilled)

    def lend(self, memory: SlabMemory, owner: Incarnation, descriptor: Descriptor, unfilled: Unfilled) -> memoryview:
        """What `descriptor` of `owner` says of the slab `memory`, which is held; otherwise as `fetch`."""
        if memory.is_filling or memory.is_torn:
            unfilled.append(memory)
        loan = memory.view(descriptor[NBYTES])
        address = memory.address

        @interrupts.uninterrupted
        def give_back(reference: weakref.ref[Any]) -> None:
            known = self._loans.get(address)
            if known is not None and known.reference is reference:
                del self._loans[address]
                memory.free()

        self._loans[address] = _Loan(weakref.ref(loan, give_back), memory, owner, descriptor)
        return loan.data

    def hand_back(self, owner: Incarnation, buffers: list[Any], handed: list[Descriptor]) -> None:
        """Give slabs of `owner` back, held, with a message to it.

        Args:
            owner: of the slabs, and who gets the message.
            buffers: of the message. Those that fill a slab of `owner`, and that nobody else sees, become `HandedBack`.
            handed: gets the descriptors of these slabs.
        """
        for index in range(len(buffers)):
            if isinstance(buffers[index], memoryview):
                loan = self._loans.get(address_of(buffers[index]))
                if loan is not None and loan.owner == owner:
                    self._hand_back(loan, buffers, index, handed)

    def _hand_back(self, loan: _Loan, buffers: list[Any], index: int, handed: list[Descriptor]) -> None:
        """Nobody else sees it if it dies with the message's own reference."""
        memory, nbytes = loan.memory, buffers[index].nbytes
        descriptor: Descriptor = [memory.number, nbytes, HANDED_BACK, NO_FILE]
        is_known = self._mapped.get((loan.owner, memory.number, NO_SLOT)) is memory  # else its owner is lost
        if not is_known or memory.is_retired() or size_class(nbytes) != memory.room:
            return
        if self._loans.pop(memory.address, None) is None:  # so it stays held; or another message sees it and tries now
            return
        buffers[index] = HandedBack(descriptor, nbytes)
        seen = loan.reference()
        if seen is None:
            handed.append(descriptor)
        else:
            self._loans[memory.address] = loan
            buffers[index] = seen.data[:nbytes]

    def take_back(self, owner: Incarnation, descriptor: Descriptor) -> None:
        """`owner` was not told, after all, that the slab that `descriptor` tells of is its own again: it is free."""
        with self._lock:
            memory = self._mapped.get((owner, descriptor[NUMBER], NO_SLOT))
        if memory is not None:
            memory.free()

    def pin(self, buffer: Buffer, pins: Pins) -> None:
        """Have `pins` pin the slab that `buffer` lies in, if it is one that `lend` has handed out. Once a slab."""
        loan = self._loans.get(address_of(buffer))
        if loan is None or loan.memory.was_pinned:
            return
        with self._lock:
            is_home = loan.owner == NOBODY and not loan.memory.is_retired()
            if is_home or any(memory is loan.memory for memory in self._mapped.values()):  # else nobody would unpin it
                loan.memory.pin(pins)

    def counts(self) -> dict[str, int]:
        """How many slabs of others are mapped here, and how many loans of them are out."""
        with self._lock:
            return {"mapped": len(self._mapped), "loans": len(self._loans)}

    def forget(self, source: Incarnation) -> None:
        """`source` is gone: keep nothing mapped of it but what is in use."""
        self._let_go(lambda key, _: key[0] == source)

    def trim(self) -> None:
        """Keep nothing mapped but what is in use of slabs that their owners have let go of."""
        self._let_go(lambda _, memory: memory.is_over())

    def close(self) -> None:
        """Keep nothing mapped but what is in use."""
        self._let_go(lambda *_: True)

    def _let_go(self, is_over: Callable[[_Key, SlabMemory], bool]) -> None:
        """Keep those no longer. They are unmapped outside the lock, which takes a while: so no thread waits for it."""
        with self._lock:
            gone = [key for key, memory in self._mapped.items() if is_over(key, memory)]
            left = [self._mapped.pop(key) for key in gone]
            for memory in left:
                memory.leave()

    def _map(self, source: Incarnation, number: int, slot: int, files: Sequence[OwnedFile | None]) -> SlabMemory:
        key = (source, number, slot)
        with self._lock:
            memory = self._mapped.get(key)
        if memory is not None:
            return memory
        self.trim()
        if not files:
            raise ProtocolError(f"the file of a slab of {source.hex()} did not come with it")
        if files[0] is None:
            raise LimitError(
                f"a large buffer could not be received, as process {os.getpid()} may open no more files "
                f"({descriptors.describe()}): raise its limit with `ulimit -n`"
            )
        with self._lock:
            if sum([owner == source for owner, _, _ in self._mapped]) >= MAPPED_MAX:
                raise ProtocolError(f"{MAPPED_MAX} slabs of {source.hex()} are mapped, and it has let go of none")
            try:
                memory = open_slab(files[0], slot)
            except OSError as error:
                if error.errno in _TOO_MUCH:
                    raise LimitError(
                        f"a large buffer could not be received, as process {os.getpid()} can map no more memory "
                        f"({error}): raise its limit with `ulimit -v`, or vm.max_map_count with `sysctl -w`"
                    ) from error
                raise ProtocolError(f"a slab of {source.hex()} cannot be mapped: {error}") from error
            if memory.number != number:
                raise ProtocolError(f"the file of another slab of {source.hex()} came")
            self._mapped[key] = memory
        return memory
