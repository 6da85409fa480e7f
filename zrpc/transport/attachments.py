"""The slabs of other workers that this one has mapped, and the loans made of them."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from zrpc.errors import ProtocolError
from zrpc.transport.slab import Descriptor, SlabMemory, open_slab

if TYPE_CHECKING:
    from zrpc.ids import Incarnation


class Attachments:
    """What `fetch` hands out is a loan: its slab is free again when nobody sees it any more.

    The table of slabs is owned by the lock. Loans are entered and taken out by single dict operations, which are
    atomic: one may die anywhere, inside a garbage collection too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[tuple[Incarnation, int], SlabMemory] = {}
        self._loans: dict[int, weakref.ref[Any]] = {}

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

        def give_back(reference: weakref.ref[Any]) -> None:
            self._loans.pop(id(reference), None)
            memory.free()

        reference = weakref.ref(loan, give_back)
        self._loans[id(reference)] = reference
        return loan.data

    def forget(self, source: Incarnation) -> None:
        """`source` is gone: keep nothing mapped of it but what is in use."""
        with self._lock:
            for key in [key for key in self._mapped if key[0] == source]:
                del self._mapped[key]

    def close(self) -> None:
        """Keep nothing mapped but what is in use."""
        with self._lock:
            self._mapped.clear()

    def _map(self, source: Incarnation, pid: int, fd: int, number: int) -> SlabMemory:
        with self._lock:
            memory = self._mapped.get((source, number))
            if memory is not None:
                return memory
            for key in [key for key, known in self._mapped.items() if known.is_retired()]:
                del self._mapped[key]
            try:
                memory = open_slab(pid, fd)
            except OSError as error:
                raise ProtocolError(f"a slab of process {pid} cannot be mapped: {error}") from error
            if memory.number != number:
                raise ProtocolError(f"a slab of process {pid} is gone: another file stands in its place")
            self._mapped[source, number] = memory
            return memory
