"""Flow control between two workers: how much may lie between them that the other side has not read.

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

`Lane` decides, for one peer. `Lanes` has the locks, and sends.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from zrpc.errors import ZrpcError
from zrpc.wire.envelope import nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

    Send = Callable[[Incarnation, Sequence[Buffer]], None]

COUNTED_MIN_NBYTES = 16_384
"""Messages up to this size do not count: what counts takes a lock."""
MAGIC = 0xC1
_HEADER = struct.Struct("<BBQ")  # magic, kind, bytes sent so far
_MARK, _CONFIRMED = 1, 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mark:
    """To be sent: so many bytes were sent before this."""

    total: int


class Lane(Generic[T]):
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


class _Locked:
    """A lane and its lock. `is_clear`, which anybody may read, says that nothing waits or is just being sent."""

    __slots__ = ("is_clear", "lane", "lock")

    def __init__(self, credit_nbytes: int) -> None:
        self.lock = threading.Lock()
        self.lane: Lane[Sequence[Buffer]] = Lane(credit_nbytes)
        self.is_clear = True


class Lanes:
    """The lanes of one worker. Any thread may use it.

    Args:
        send: sends a message to a peer, as `Endpoint.send`.
        credit_nbytes: what may be on the way to each.
    """

    def __init__(self, send: Send, credit_nbytes: int) -> None:
        self._send = send
        self._credit_nbytes = credit_nbytes
        self._lanes: dict[Incarnation, _Locked] = {}
        self._owed: dict[Incarnation, bytes] = {}

    def send(self, peer: Incarnation, frames: Sequence[Buffer]) -> None:
        """Send one message, or keep it until the peer has read enough of what was sent before. Never waits.

        Where it raises, the message is not kept; those of others that waited before it are.

        Raises:
            PeerLostError: the peer is gone.
            AgentClosedError: this end is closed.
            OverloadedError: too much waits to leave.
        """
        locked = self._lanes.get(peer)
        if len(frames) == 1 and len(frames[0]) <= COUNTED_MIN_NBYTES and (locked is None or locked.is_clear):
            self._send(peer, frames)
            return
        if locked is None:
            locked = self._lanes.setdefault(peer, _Locked(self._credit_nbytes))
        with locked.lock:
            try:
                self._carry_out(peer, locked, locked.lane.send(frames, nbytes_of(frames)))
            except BaseException:
                locked.lane.drop(frames)
                raise

    def is_mark(self, frames: Sequence[Buffer]) -> bool:
        """Whether `frames` are neither an envelope nor a chunk, but flow control."""
        return len(frames) == 1 and len(frames[0]) == _HEADER.size and frames[0][0] == MAGIC

    def receive(self, source: Incarnation, frames: Sequence[Buffer]) -> None:
        """A mark came, to be sent back, or one that was. For the reading thread."""
        _, kind, total = _HEADER.unpack(frames[0])
        if kind == _MARK:
            self._confirm(source, _HEADER.pack(MAGIC, _CONFIRMED, total))
            return
        locked = self._lanes.get(source)
        if locked is not None:
            with locked.lock, suppress(ZrpcError):  # the peer is gone, and whoever waits for it is told
                self._carry_out(source, locked, locked.lane.confirm(total))

    def meet(self, peer: Incarnation) -> None:
        """`peer` can be sent to from now on: send it what could not be sent before."""
        owed = self._owed.pop(peer, None)
        if owed is not None:
            self._confirm(peer, owed)

    def queued_nbytes(self, peer: Incarnation) -> int:
        """How much waits here for `peer`, in bytes."""
        locked = self._lanes.get(peer)
        return 0 if locked is None else locked.lane.queued_nbytes

    def forget(self, peer: Incarnation) -> None:
        """`peer` is gone, and what waits for it is dropped."""
        self._lanes.pop(peer, None)
        self._owed.pop(peer, None)

    def flush(self) -> None:
        """Give all that waits to the transport: this worker shuts down."""
        for peer, locked in list(self._lanes.items()):
            with locked.lock, suppress(ZrpcError):
                self._carry_out(peer, locked, locked.lane.release())

    def _carry_out(self, peer: Incarnation, locked: _Locked, steps: list[Sequence[Buffer] | Mark]) -> None:
        """Send `steps`; what is not sent waits again. Call it under the lock."""
        locked.is_clear = False
        for index, step in enumerate(steps):
            try:
                self._send(peer, (_HEADER.pack(MAGIC, _MARK, step.total),) if isinstance(step, Mark) else step)
            except BaseException as error:
                has_stayed = isinstance(error, ZrpcError)  # Ctrl-C: it may have left
                unsent = steps[index if has_stayed else index + 1 :]
                locked.lane.take_back([(step, nbytes_of(step)) for step in unsent if not isinstance(step, Mark)])
                raise
        locked.is_clear = not locked.lane.num_queued

    def _confirm(self, source: Incarnation, mark: bytes) -> None:
        """Send a mark back; if its sender is not known here yet, when it is."""
        try:
            self._send(source, (mark,))
        except ZrpcError:
            self._owed[source] = mark
