"""The slabs of other workers that this one has mapped, and the loans made of them."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from zrpc.errors import ProtocolError
from zrpc.transport.slab import Descriptor, Pins, SlabMemory, open_slab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

T = TypeVar("T")


class _Loan(NamedTuple):
    """What `fetch` has handed out, and where it lies."""

    reference: weakref.ref[Any]
    memory: SlabMemory


class Attachments:
    """What `fetch` hands out is a loan: its slab is free again when nobody sees it any more.

    The table of slabs is owned by the lock. Loans are entered and taken out by single dict operations, which are
    atomic: one may die anywhere, inside a garbage collection too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[tuple[Incarnation, int], SlabMemory] = {}
        self._loans: dict[int, _Loan] = {}
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
        loan = memory.view(nbytes)

        key = id(loan)  # nobody else's while it lives

        def give_back(_: weakref.ref[Any]) -> None:
            self._loans.pop(key, None)
            memory.free()

        self._loans[key] = _Loan(weakref.ref(loan, give_back), memory)
        return loan.data

    def pin(self, buffer: Buffer, pins: Pins) -> None:
        """Have `pins` pin the slab that `buffer` lies in, if it is one that `fetch` has handed out. Once a slab."""
        loan = self._loans.get(id(buffer.obj)) if isinstance(buffer, memoryview) else None
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
        loan = self._loans.get(id(buffer.obj)) if isinstance(buffer, memoryview) else None
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
