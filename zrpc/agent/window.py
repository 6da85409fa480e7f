"""Who may send a request now, and who waits: the decisions behind backpressure, for one peer.

A caller that calls faster than its callee answers would fill its own memory, the broker's and the callee's. The window
bounds what is on the way: the bytes of the requests that were not answered yet, and their number.

- Only messages over `COUNTED_MIN_NBYTES` count in bytes. Smaller ones count as calls, and no more.
- A message that is larger than the whole window may go when no other counted bytes are on the way.
- Large messages wait in line, and so do small ones, in a line of their own: they pass large ones that wait for bytes.
  Where both lines could go on, the one whose first has waited longer does. So nobody waits for ever.
- Answers are never held back: a worker that waited for room with an answer in its hands would keep the room it needs.
- A request whose time ran out still counts, because it may still lie somewhere between here and its function. It counts
  until it is answered after all, or its peer is lost.

No lock, thread or clock here. `take` and `forget` may be called by any thread at any time: they do nothing but single
operations on a dict, which the interpreter makes atomic (threads that `take` at the same moment may pass the limit of
calls, by one each). Everything else belongs to whoever guards the window; `zrpc.agent.gate` does.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

COUNTED_MIN_NBYTES = 4096
"""Messages up to this size do not count in bytes: what counts takes a lock, which costs a small call too much."""

UNKNOWN = -1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """One who waits: `place` says since when, in the order of coming."""

    place: int
    call_id: int
    counted: int
    who: T


class Window(Generic[T]):
    """What is on the way to one peer. `T` is whatever stands for one who waits.

    Args:
        max_nbytes: bytes of unanswered requests; 0: no limit.
        max_calls: unanswered requests; 0: no limit.

    Attributes:
        num_waiting: how many requests wait. To be read only.
    """

    __slots__ = ("_calls", "_closed", "_lines", "_max_calls", "_max_nbytes", "_nbytes", "_places", "num_waiting")

    def __init__(self, max_nbytes: int, max_calls: int) -> None:
        self._max_nbytes = max_nbytes or sys.maxsize
        self._max_calls = max_calls or sys.maxsize
        self._calls: dict[int, int] = {}  # call id -> its counted bytes
        self._nbytes = 0
        self._lines: tuple[deque[Waiting[T]], deque[Waiting[T]]] = deque(), deque()  # small ones, large ones
        self._places = 0
        self._closed = False
        self.num_waiting = 0

    @property
    def nbytes(self) -> int:
        """Counted bytes on the way."""
        return self._nbytes

    @property
    def num_calls(self) -> int:
        """Requests on the way."""
        return len(self._calls)

    @property
    def call_ids(self) -> list[int]:
        """The requests on the way. Any thread."""
        return list(self._calls)

    def is_on_the_way(self, call_id: int) -> bool:
        """Whether that request is. Any thread."""
        return call_id in self._calls

    def take(self, call_id: int, nbytes: int) -> bool:
        """Let a small request go if nobody waits and there is room. False: `ask`. Any thread."""
        if nbytes > COUNTED_MIN_NBYTES or self.num_waiting or len(self._calls) >= self._max_calls:
            return False
        self._calls[call_id] = 0
        return True

    def forget(self, call_id: int) -> int:
        """A request was answered or never left: it is not on the way any more. Any thread.

        Returns:
            Its counted bytes, for `release`, which must follow if there are any or somebody waits; `UNKNOWN` if it is
            not on the way.
        """
        return self._calls.pop(call_id, UNKNOWN)

    def ask(self, call_id: int, nbytes: int) -> bool:
        """Let a request go if none like it waits and there is room. False: it may `line_up`."""
        counted = _counted(nbytes)
        if not self._closed and (self._line_of(counted) or not self._has_room_for(counted)):
            return False
        self._enter(call_id, counted)
        return True

    def line_up(self, call_id: int, nbytes: int, who: T) -> list[T]:
        """Have a request wait in line, which `ask` refused; who may go now, be it this very one."""
        counted = _counted(nbytes)
        self._places += 1
        self.num_waiting += 1
        self._line_of(counted).append(Waiting(self._places, call_id, counted, who))
        return self._admit()

    def force(self, call_id: int, nbytes: int) -> None:
        """Let a request go, room or not: its thread must not wait."""
        self._enter(call_id, _counted(nbytes))

    def release(self, nbytes: int) -> list[T]:
        """Counted bytes were forgotten (0: a small request was): who may go now, in their order."""
        if not self._closed:
            self._nbytes -= nbytes
        return self._admit()

    def withdraw(self, call_id: int) -> list[T]:
        """A request waits no longer, its time ran out; who may go now. Nothing happens if it may go already."""
        for line in self._lines:
            for waiting in line:
                if waiting.call_id == call_id:
                    line.remove(waiting)
                    self.num_waiting -= 1
                    return self._admit()
        return []

    def close(self) -> list[T]:
        """The peer is gone: who waited. From now on everybody may go, uncounted, and is told so by the transport."""
        self._closed = True
        freed = [waiting.who for line in self._lines for waiting in line]
        for line in self._lines:
            line.clear()
        self.num_waiting = 0
        self._calls.clear()
        self._nbytes = 0
        return freed

    def _admit(self) -> list[T]:
        freed = []
        while ready := [line for line in self._lines if line and self._has_room_for(line[0].counted)]:
            first = min(ready, key=lambda line: line[0].place).popleft()
            self.num_waiting -= 1
            self._enter(first.call_id, first.counted)
            freed.append(first.who)
        return freed

    def _enter(self, call_id: int, counted: int) -> None:
        if not self._closed:
            self._calls[call_id] = counted
            self._nbytes += counted

    def _has_room_for(self, counted: int) -> bool:
        fits = not counted or not self._nbytes or self._nbytes + counted <= self._max_nbytes
        return fits and len(self._calls) < self._max_calls

    def _line_of(self, counted: int) -> deque[Waiting[T]]:
        return self._lines[1 if counted else 0]


def _counted(nbytes: int) -> int:
    return nbytes if nbytes > COUNTED_MIN_NBYTES else 0
