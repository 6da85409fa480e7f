"""Bytes on their way from a device to the host, in pieces.

The thread that begins only tells the device what to copy; whoever sends waits, piece by piece. While one piece is sent
the next ones are copied: up to `AHEAD` of them are under way, in blocks of the pool. Where the pool has none to give,
the rest is begun as pieces leave.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from zrpc.errors import DeviceError
from zrpc.wire.envelope import Arriving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from zrpc.staging.accelerator import Accelerator, Event, Stream
    from zrpc.staging.pinned import Loan, PinnedPool

PIECE_NBYTES = 2 << 20
"""How much is copied and sent at once. Not measured on a GPU yet: a compromise between the pieces of 1 MiB that sockets
like (`zrpc.transport.chunks`) and the larger copies that amortize their launch."""
AHEAD = 8
"""So many pieces are begun before the first is sent."""


class _Piece(NamedTuple):
    loan: Loan
    event: Event


class Outgoing(Arriving):
    """One buffer on its way. The thread that made it hands it to the one that reads it; no two use it at once.

    Args:
        accelerator: whose device it is.
        pool: where it goes.
        waiting: entered while a thread waits for the device.
        source: uint8, on a device.
        stream: copies; it has been told to wait for what makes the source.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pool: PinnedPool,
        waiting: Callable[[], AbstractContextManager[None]],
        source: torch.Tensor,
        stream: Stream,
    ) -> None:
        self.nbytes = source.numel()
        self._accelerator = accelerator
        self._pool = pool
        self._waiting = waiting
        self._source: torch.Tensor | None = source
        self._stream = stream
        self._begun = 0
        self._pieces: deque[_Piece] = deque()
        self._go_ahead()

    def pieces(self) -> Iterator[memoryview]:
        """See `Arriving.pieces`."""
        try:
            while self._pieces or self._begun < self.nbytes:
                if not self._pieces:
                    self._begin(self._pool.borrow(self._next_nbytes()))
                loan, event = self._pieces.popleft()
                self._go_ahead()
                if not event.query():
                    with self._waiting():
                        event.synchronize()
                view = loan.array.data
                del loan
                yield view
        except RuntimeError as error:
            raise DeviceError(f"a tensor could not be copied from its device to the host: {error}") from error
        self._source = None

    def _next_nbytes(self) -> int:
        return min(PIECE_NBYTES, self.nbytes - self._begun)

    def _go_ahead(self) -> None:
        """Begin as many pieces as may be under way and have room in the pool."""
        while len(self._pieces) < AHEAD and self._begun < self.nbytes:
            loan = self._pool.lend(self._next_nbytes())
            if loan is None:
                return
            self._begin(loan)

    def _begin(self, loan: Loan) -> None:
        assert self._source is not None
        stop = self._begun + loan.array.nbytes
        self._accelerator.copy(loan.tensor, self._source[self._begun : stop], self._stream)
        event = self._accelerator.record(self._stream)
        loan.in_use_until(event)
        self._begun = stop
        self._pieces.append(_Piece(loan, event))
