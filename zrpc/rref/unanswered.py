"""Telling callees of calls that ended without an answer.

What: a request may be lost on its way, or its answer: with a connection that broke, say. Then nothing would ever be
heard of the RRefs in it, and whoever handed them out would keep them, and their values, for as long as both workers
live. So a caller tells the callee which calls it had no answer to. That is said once for each, also where no RRef is
known of: the answer may have carried one.

Invariants: one message a callee is under way at a time, and takes with it all that was noted before.

Threads: any may `note`, and it does not block. The lock owns the rest. Messages are sent by the control thread.

Failure: it is said again until the callee acknowledges it, or is lost.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.wire.unanswered import CallsUnanswered

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent
    from zrpc.ids import Incarnation, WorkerInfo

MAX_CALLS = 1_000
"""In one message."""


class Unanswered:
    """The calls of one worker that its callees are still to be told of.

    Args:
        agent: sends the messages.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._lock = threading.Lock()
        self._noted: dict[Incarnation, list[list[Any]]] = {}  # an entry while a message is under way, or about to be

    def note(self, to: WorkerInfo, call_id: int, forks: list[bytes]) -> None:
        """A call to `to` ended without an answer; its request carried `forks`."""
        call = [call_id, forks]
        with self._lock:
            noted = self._noted.get(to.incarnation)
            if noted is not None:
                noted.append(call)
                return
            self._noted[to.incarnation] = [call]
        self._agent.control.submit(partial(self._tell, to))

    def _tell(self, to: WorkerInfo) -> None:
        with self._lock:
            noted = self._noted[to.incarnation]
            told = noted[:MAX_CALLS]
            del noted[:MAX_CALLS]
        self._agent.notify(to, CallsUnanswered(told), partial(self._told, to))

    def _told(self, to: WorkerInfo, error: BaseException | None) -> None:
        with self._lock:
            if error is not None or not self._noted[to.incarnation]:
                del self._noted[to.incarnation]
                return
        self._agent.control.submit(partial(self._tell, to))
