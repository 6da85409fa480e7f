"""The slabs of other workers that this one has mapped, and the loans made of them."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from zrpc.errors import ProtocolError
from zrpc.transport.slab import Descriptor, Pins, SlabMemory, address_of, open_slab, size_class
from zrpc.wire.envelope import Exported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

T = TypeVar("T")


class _Loan(NamedTuple):
    """What `lend` has handed out, where it lies, and whose that is by which descriptor."""

    reference: weakref.ref[Any]
    memory: SlabMemory
    owner: Incarnation
    descriptor: Descriptor


class _HandedBack(Exported):
    """A buffer that lies in a slab of the receiver's."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self.nbytes = descriptor[-1]

    def descriptor(self) -> Descriptor:
        return self._descriptor

    def has_left(self) -> None:
        """It is the receiver's business now."""


class Attachments:
    """What `fetch` hands out is a loan: its slab is free again when nobody sees it any more.

    The table of slabs is owned by the lock. Loans are entered and taken out by single dict operations, which are
    atomic: one may die anywhere, inside a garbage collection too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[tuple[Incarnation, int], SlabMemory] = {}
        self._loans: dict[int, _Loan] = {}  # by the address, nobody else's while it lives
        self._pins: Pins | None = None

    def fetch(self, source: Incarnation, descriptor: Descriptor) -> memoryview:
        """The memory that `descriptor` of the worker `source` tells of; free again once nobody sees it any more.

        Raises:
            ProtocolError: the slab is not there, or it is smaller.
        """
        if [type(part) for part in descriptor] != [int] * 4:
            raise ProtocolError(f"{descriptor!r} describes no slab")
        pid, fd, number, nbytes = descriptor
        memory = self._map(source, pid, fd, number)
        if not 0 < nbytes <= memory.room:
            raise ProtocolError(f"a slab of process {pid} has no room for {nbytes} bytes")
        return self.lend(memory, source, descriptor)

    def lend(self, memory: SlabMemory, owner: Incarnation, descriptor: Descriptor) -> memoryview:
        """What `descriptor` of `owner` says of the slab `memory`, which is held; free again once nobody sees it."""
        loan = memory.view(descriptor[-1])
        address = memory.address

        def give_back(_: weakref.ref[Any]) -> None:
            if self._loans.pop(address, None) is not None:
                memory.free()

        self._loans[address] = _Loan(weakref.ref(loan, give_back), memory, owner, descriptor)
        return loan.data

    def hand_back(self, owner: Incarnation, buffers: list[Any]) -> list[Descriptor]:
        """Give slabs of `owner` back, held, with a message to it.

        Args:
            owner: of the slabs, and who gets the message.
            buffers: of the message. Those that fill a slab of `owner`, and that nobody else sees, become `Exported`.

        Returns:
            The descriptors of these slabs.
        """
        handed: list[Descriptor] = []
        for index in range(len(buffers)):
            if isinstance(buffers[index], memoryview):
                loan = self._loans.get(address_of(buffers[index]))
                if loan is not None and loan.owner == owner and self._hand_back(loan, buffers, index):
                    handed.append(buffers[index].descriptor())
        return handed

    def _hand_back(self, loan: _Loan, buffers: list[Any], index: int) -> bool:
        """Nobody else sees it if it dies with the message's own reference."""
        nbytes = buffers[index].nbytes
        memory = loan.memory
        if size_class(nbytes) != memory.room or memory.is_retired():
            return False
        if self._loans.pop(memory.address, None) is None:  # so it stays held; or another message sees it and tries now
            return False
        buffers[index] = _HandedBack([*loan.descriptor[:-1], nbytes])
        seen = loan.reference()
        if seen is None:
            return True
        self._loans[memory.address] = loan
        buffers[index] = seen.data[:nbytes]
        return False

    def take_back(self, owner: Incarnation, descriptor: Descriptor) -> None:
        """`owner` was not told, after all, that the slab that `descriptor` tells of is its own again: it is free."""
        with self._lock:
            memory = self._mapped.get((owner, descriptor[2]))
        if memory is not None:
            memory.free()

    def pin(self, buffer: Buffer, pins: Pins) -> None:
        """Have `pins` pin the slab that `buffer` lies in, if it is one that `fetch` has handed out. Once a slab."""
        loan = self._loans.get(address_of(buffer))
        if loan is None or loan.memory.was_pinned:
            return
        with self._lock:
            self._pins = pins
            if any(memory is loan.memory for memory in self._mapped.values()):  # else nobody would unpin it
                loan.memory.pin(pins)

    def beside(self, buffer: Buffer, make: Callable[[], T]) -> T:
        """What `make` made when it was first called for the slab that `buffer` lies in; it goes with the mapping.

        The mapping goes when its owner has let go of the slab or is gone, but not while anybody sees `buffer`.

        Raises:
            ProtocolError: `buffer` is not one that `fetch` has handed out.
        """
        loan = self._loans.get(address_of(buffer))
        if loan is None:
            raise ProtocolError("a note of device memory does not lie in shared memory")
        if loan.memory.beside is None:  # a slab is one message's at a time, so nobody else asks now
            loan.memory.beside = make()
        return cast("T", loan.memory.beside)

    def forget(self, source: Incarnation) -> None:
        """`source` is gone: keep nothing mapped of it but what is in use."""
        with self._lock:
            self._let_go([key for key in self._mapped if key[0] == source])

    def close(self) -> None:
        """Keep nothing mapped but what is in use."""
        with self._lock:
            self._let_go(list(self._mapped))

    def _let_go(self, keys: Iterable[tuple[Incarnation, int]]) -> None:
        """Keep these no longer. Call it under the lock."""
        for key in keys:
            memory = self._mapped.pop(key)
            if self._pins is not None:
                memory.unpin(self._pins)

    def _map(self, source: Incarnation, pid: int, fd: int, number: int) -> SlabMemory:
        with self._lock:
            memory = self._mapped.get((source, number))
            if memory is not None:
                return memory
            self._let_go([key for key, known in self._mapped.items() if known.is_retired()])
            try:
                memory = open_slab(pid, fd)
            except OSError as error:
                raise ProtocolError(f"a slab of process {pid} cannot be mapped: {error}") from error
            if memory.number != number:
                raise ProtocolError(f"a slab of process {pid} is gone: another file stands in its place")
            self._mapped[source, number] = memory
            return memory
