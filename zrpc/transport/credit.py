"""Links that know how much their peer has not read yet, and send no more than so much ahead.

ZeroMQ counts messages, not bytes, and a sender's queue, a broker's and the receiver's are all long. So a worker that
reads slowly, or not at all for a while, would have gigabytes wait for it, much of it in a broker that serves everybody.
Here the sender counts. After every quarter of its credit it sends a mark with the bytes sent so far, and the reading
thread of the other side sends it back at once. What was sent and not confirmed by a mark is at most the credit, or one
message; the rest waits here, in order. What waits are references to the memory that the message is made of: nothing is
copied.

- Marks need no state on the other side, and one that is lost with a broken connection does no harm: the next one
  confirms all that was sent before it. While messages wait, marks are sent again now and then.
- Reading does not wait for user functions, so a mark comes back unless the other process stands still.
- Small messages do not count; if others wait, they wait behind them.

`Credit` decides, for one peer. `CreditLink` has the lock, and sends. Local links need neither: the kernel takes little.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from zrpc.errors import NotConnectedError, PeerLostError, ZrpcError
from zrpc.wire.envelope import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.transport.link import Link
    from zrpc.wire.envelope import Buffer

COUNTED_MIN_NBYTES = 16_384
"""Messages up to this size do not count: what counts takes a lock."""
_MAGIC = 0xC1
_HEADER = struct.Struct("<BBQ")  # magic, kind, bytes sent so far
_MARK, _CONFIRMED = 1, 2
_STARTS = (bytes([_MAGIC, _MARK]), bytes([_MAGIC, _CONFIRMED]))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mark:
    """To be sent: so many bytes were sent before this."""

    total: int

    def packed(self) -> bytes:
        """Its frame."""
        return _HEADER.pack(_MAGIC, _MARK, self.total)


class Credit(Generic[T]):
    """What may be sent to one peer now. No lock, thread or clock; whoever calls it owns it.

    Every method returns what is to be sent now, in this order.

    Args:
        credit_nbytes: what may be on the way.
    """

    __slots__ = ("_confirmed", "_credit", "_every", "_marked", "_queue", "_sent", "queued_nbytes")

    def __init__(self, credit_nbytes: int) -> None:
        self._credit = credit_nbytes
        self._every = credit_nbytes // 4
        self._sent = self._marked = self._confirmed = 0
        self._queue: deque[tuple[T, int]] = deque()
        self.queued_nbytes = 0

    @property
    def num_queued(self) -> int:
        """How many messages wait."""
        return len(self._queue)

    def send(self, message: T, nbytes: int) -> list[T | Mark]:
        """A message is to be sent."""
        self._queue.append((message, nbytes))
        self.queued_nbytes += nbytes
        now = self._advance()
        waiting = len(self._queue)
        if waiting and not waiting & (waiting - 1) and not any(type(step) is Mark for step in now):
            now.append(self._mark())  # at 1, 2, 4, 8, ... waiting messages: the last mark may be lost
        return now

    def confirm(self, total: int) -> list[T | Mark]:
        """The mark `total` came back. Repeated and late ones change nothing."""
        self._confirmed = max(self._confirmed, min(total, self._sent))
        return self._advance()

    def release(self) -> list[T | Mark]:
        """Send all that waits, whatever the credit: this worker shuts down."""
        freed: list[T | Mark] = [message for message, _ in self._queue]
        self._queue.clear()
        self.queued_nbytes = 0
        return freed

    def take_back(self, messages: Sequence[tuple[T, int]]) -> None:
        """These, with their sizes, were to be sent and were not, nor were marks behind them: they come next."""
        self._queue.extendleft(reversed(messages))
        nbytes = sum(nbytes for _, nbytes in messages)
        self.queued_nbytes += nbytes
        self._sent -= nbytes
        self._marked = self._confirmed  # else a mark that was not sent might be waited for

    def drop(self, message: T) -> None:
        """The last message is not to be sent after all, if it waits."""
        if self._queue and self._queue[-1][0] is message:
            self.queued_nbytes -= self._queue.pop()[1]

    def _advance(self) -> list[T | Mark]:
        now: list[T | Mark] = []
        while self._queue and self._has_credit(self._queue[0][1]):
            message, nbytes = self._queue.popleft()
            self.queued_nbytes -= nbytes
            self._sent += nbytes
            now.append(message)
            if self._sent - self._marked >= self._every:
                now.append(self._mark())
        if self._queue and self._marked < self._sent:  # or nothing would ever confirm what was sent since
            now.append(self._mark())
        return now

    def _has_credit(self, nbytes: int) -> bool:
        unconfirmed = self._sent - self._confirmed
        return not unconfirmed or unconfirmed + nbytes <= self._credit

    def _mark(self) -> Mark:
        self._marked = self._sent
        return Mark(self._sent)


class CreditLink:
    """A link that sends a bounded number of bytes ahead of what its peer has read. The lock owns the rest.

    Args:
        link: what messages are sent on.
        credit_nbytes: what may be on the way.
    """

    takes_files = False

    def __init__(self, link: Link, credit_nbytes: int) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._credit: Credit[Sequence[Buffer]] = Credit(credit_nbytes)
        self._closed: ZrpcError | None = None
        self._is_clear = True  # nothing waits or is just being sent; anybody may read it

    @property
    def queued_nbytes(self) -> int:
        """See `Link.queued_nbytes`."""
        return self._credit.queued_nbytes + self._link.queued_nbytes

    def send(self, frames: Sequence[Buffer]) -> None:
        """See `Link.send`. Where it raises, the message is not kept; those that waited before it are."""
        if self._is_clear and len(frames) == 1 and len(frames[0]) <= COUNTED_MIN_NBYTES:
            self._link.send(frames)
            return
        with self._lock:
            if self._closed is not None:
                raise type(self._closed)(str(self._closed))
            try:
                self._carry_out(self._credit.send(frames, nbytes_of(frames)))
            except BaseException:
                self._credit.drop(frames)
                raise

    def confirm(self, total: int) -> None:
        """The mark `total` came back. For the thread that reads."""
        with self._lock, suppress(ZrpcError):  # the peer is gone, and whoever waits for it is told
            self._carry_out(self._credit.confirm(total))

    def release(self) -> None:
        """Give all that waits to the system."""
        with self._lock, suppress(ZrpcError):
            self._carry_out(self._credit.release())

    def flush(self, timeout_s: float) -> None:
        """See `Link.flush`."""
        self.release()
        self._link.flush(timeout_s)

    def close(self, linger_s: float) -> None:
        """See `Link.close`."""
        self._end(PeerLostError("the connection is closed"))
        self._link.close(linger_s)

    def break_off(self) -> None:
        """The connection below is gone: drop what waits, and have later messages raise `NotConnectedError`."""
        self._end(NotConnectedError("the connection to the broker broke. The message was not sent"))

    def _end(self, error: ZrpcError) -> None:
        with self._lock:
            self._closed = self._closed or error
            self._credit.release()

    def _carry_out(self, steps: list[Sequence[Buffer] | Mark]) -> None:
        """Send `steps`; what is not sent waits again. Call it under the lock."""
        self._is_clear = False
        for index, step in enumerate(steps):
            try:
                self._link.send((step.packed(),) if isinstance(step, Mark) else step)
            except BaseException as error:
                has_stayed = isinstance(error, ZrpcError)  # Ctrl-C: it may have left
                unsent = steps[index if has_stayed else index + 1 :]
                self._credit.take_back([(step, nbytes_of(step)) for step in unsent if not isinstance(step, Mark)])
                raise
        self._is_clear = not self._credit.num_queued


def is_mark(frames: Sequence[Buffer]) -> bool:
    """Whether `frames` are no message, but a mark."""
    return len(frames) == 1 and len(frames[0]) == _HEADER.size and frames[0][:2] in _STARTS


def answer_of(frames: Sequence[Buffer]) -> bytes | None:
    """What is to be sent back for a mark; None: it is one that came back."""
    _, kind, total = _HEADER.unpack(frames[0])
    return _HEADER.pack(_MAGIC, _CONFIRMED, total) if kind == _MARK else None


def total_of(frames: Sequence[Buffer]) -> int:
    """What a mark that came back confirms, in bytes."""
    return int(_HEADER.unpack(frames[0])[2])
