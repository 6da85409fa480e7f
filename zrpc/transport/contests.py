"""Connections that say that they are of a worker which has another one.

What: a worker that connects again has let go of its connection before, but that may not have been seen to end. Somebody
else that knows the group's secret may say that it is that worker. So a newer connection does not count as long as the
older one is there. What it says is kept, and looked at again until the older one is gone, or `CONTEST_S` are over: by
then ZeroMQ has noticed if nothing is behind the older one (`sockets.HEARTBEAT_TIMEOUT_MS`).

Invariants: what is kept is bounded, for each worker and in all.

Threads: belongs to the hub's. Failure: what was kept for too long is dropped. A worker that is not answered then
connects again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import zmq

    from zrpc.ids import Incarnation

    Message = tuple[bytes, zmq.Frame, list[zmq.Frame]]
    """An identity, the last part, and all parts behind the identity."""

CONTEST_S = 15.0
LOOK_S = 0.05
MESSAGES_MAX = 8
MESSAGE_MAX_NBYTES = 1 << 20
CONTESTS_MAX = 256

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Contest:
    since: float
    messages: list[Message] = field(default_factory=list)


class Contests:
    """What newer connections have said.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._contests: dict[Incarnation, _Contest] = {}
        self._look_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._contests)

    def has(self, source: Incarnation) -> bool:
        """Whether something of `source` is kept: what comes later of the same connection must wait, too."""
        contest = self._contests.get(source)
        return contest is not None and bool(contest.messages)

    def add(self, source: Incarnation, message: Message) -> None:
        """Keep a message of a newer connection of `source`."""
        contest = self._contests.get(source)
        if contest is None:
            if len(self._contests) >= CONTESTS_MAX:
                return
            contest = self._contests[source] = _Contest(self._clock())
            _log.warning("worker %s has a connection, and another one waits until that is gone", source.hex())
        if len(contest.messages) < MESSAGES_MAX and sum(map(len, message[2])) <= MESSAGE_MAX_NBYTES:
            contest.messages.append(message)

    def take_due(self) -> list[Message]:
        """What is to be looked at again; it is added anew if the older connection is still there."""
        now = self._clock()
        if now < self._look_at:
            return []
        self._look_at = now + LOOK_S
        due: list[Message] = []
        for source, contest in list(self._contests.items()):
            if now - contest.since > CONTEST_S or not contest.messages:
                del self._contests[source]
            else:
                due += contest.messages
                contest.messages = []
        return due
