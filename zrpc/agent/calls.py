"""The calls under way of one worker: each is ended once, by the thread that takes it out of the table.

What is to be done next, its callbacks, is given back as work: the thread that reads does none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc import interrupts
from zrpc.agent.deadlines import Deadlines

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from zrpc.agent.call import Call
    from zrpc.agent.gate import Gates
    from zrpc.ids import Incarnation
    from zrpc.transport.inbox import Work
    from zrpc.wire.envelope import Envelope


class Calls:
    """Any thread may use it: each entry is taken out by one dict.pop, which is atomic.

    Args:
        gates: are told of calls that ended.
        wake_reader: wakes the caller that reads until a call is done; needed where no message ended it.
        on_late: is given answers that nobody waits for any more.
        wake: has `expire_due` called soon.

    Attributes:
        add: `add(call)` says that a call begins.
    """

    def __init__(
        self,
        gates: Gates,
        wake_reader: Callable[[Call], None],
        on_late: Callable[[Envelope], None],
        wake: Callable[[], None],
    ) -> None:
        self._gates = gates
        self._wake_reader = wake_reader
        self._on_late = on_late
        self._under_way: dict[int, Call] = {}
        self.add = self._add
        self._deadlines = Deadlines(self._expire, self._under_way.__contains__, lambda: len(self._under_way), wake)

    def __len__(self) -> int:
        return len(self._under_way)

    def all(self) -> list[Call]:
        """Those under way."""
        return list(self._under_way.values())

    def is_of_another(self, source: Incarnation, call_id: int) -> bool:
        """Whether that call is under way, and to another worker than `source`."""
        call = self._under_way.get(call_id)
        return call is not None and call.peer.incarnation != source

    def is_under_way(self, call_id: int) -> bool:
        """Whether that call is not done yet."""
        return call_id in self._under_way

    def cancel(self, call_id: int) -> None:
        """Cancel that call, unless it is done; see `Call.cancel`."""
        call = self._under_way.get(call_id)
        if call is not None:
            call.cancel()

    def _add(self, call: Call) -> None:
        self._under_way[call.call_id] = call

    def trace(self, on_begun: Callable[[Call], None] | None) -> None:
        """From now on tell `on_begun` of each call that begins, on its caller's thread; None: tell nothing."""

        def add(call: Call) -> None:
            self._add(call)
            on_begun(call)  # type: ignore[misc]  # it is one then

        self.add = self._add if on_begun is None else add

    def limit(self, call_id: int, after_s: float) -> None:
        """End a call that no thread waits for in `after_s` seconds, unless it is done by then."""
        self._deadlines.add(call_id, after_s)

    def finish(self, call_id: int, answer: Envelope | None, error: BaseException | None) -> Work | None:
        """A call is answered, or will not be. Nothing happens if it is not under way any more.

        Returns:
            What is to be done next; see `Call.complete`.
        """
        call = self._under_way.pop(call_id, None)
        if call is None:  # it timed out, or its peer was declared lost
            self._gates.leave(call_id)
            if answer is not None:
                self._on_late(answer)
            return None
        call.gate.leave(call_id)
        work = call.complete(answer, error)
        if answer is None:
            self._wake_reader(call)
        return work

    def fail(self, call_id: int, error: BaseException) -> None:
        """A call will not be answered, which is known on a thread that does not read."""
        with interrupts.held:
            work = self.finish(call_id, None, error)
        if work is not None:
            work()

    def expire_due(self) -> float | None:
        """End the calls whose time is over; see `Deadlines.run_due`."""
        return self._deadlines.run_due()

    def abandon(self, call_id: int) -> bool:
        """Take a call out, which its caller ends; false if it is done already. It still counts at its gate."""
        return self._under_way.pop(call_id, None) is not None

    def lose(
        self, peer: Incarnation, make_error: Callable[[], BaseException], but: Container[int] = frozenset()
    ) -> None:
        """End the calls to that life of a worker, each with an error of its own; those in `but` go on."""
        for call_id, call in list(self._under_way.items()):
            if call.peer.incarnation == peer and call_id not in but:
                self.fail(call_id, make_error())

    def close(self, make_error: Callable[[], BaseException]) -> None:
        """End all calls, each with an error of its own. Idempotent."""
        self._deadlines.close()
        for call_id in list(self._under_way):
            self.fail(call_id, make_error())

    def _expire(self, call_id: int) -> None:
        call = self._under_way.pop(call_id, None)
        if call is not None:
            work = call.expire()
            self._wake_reader(call)
            if work is not None:
                work()
