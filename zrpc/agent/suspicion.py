"""Which workers stand still: they leave calls unanswered and do not react, though their hosts are there.

What: a worker that has not answered calls for a while is asked whether it is there; the thread that reads answers. One
that does not answer within `limit_s` is *suspected*, which the log says once. It is asked on. When it answers it has
come back, which the log says too. Nothing else follows: calls to it end at their time limits, or are answered when it
goes on. A worker that is lost is not suspected any more.

Threads: `look` runs on the control thread. Answers come on any; what they change is one dict or set operation.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from zrpc.errors import LimitError, ZrpcError
from zrpc.wire.messages import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.call import Call
    from zrpc.agent.client import Client
    from zrpc.agent.gate import Gates
    from zrpc.agent.peers import Peers
    from zrpc.ids import Incarnation, WorkerInfo

log = logging.getLogger("zrpc")

LOOKS = 2
"""So often in the time limit it is looked who has calls to answer."""


ALMOST = 0.9
"""What failed before this share of the time limit did not run out of time: the worker could not be asked, say."""


class Suspicions:
    """The workers that one worker suspects.

    Args:
        limit_s: how long an answer may take.
        gates: say to whom calls are under way.
        peers: who is here.
        client: asks.
        submit: runs a task on the control thread.
        callers: those that wait for this worker: their end is to be noticed, too.

    Attributes:
        since: since when each of them is suspected (`time.monotonic`), by its life.
    """

    def __init__(
        self, limit_s: float, gates: Gates, peers: Peers, client: Client,
        submit: Callable[[Callable[[], object]], None], callers: Callable[[], list[WorkerInfo]],
    ) -> None:  # fmt: skip
        self.since: dict[Incarnation, float] = {}
        self._limit_s = limit_s
        self._interval_s = limit_s / LOOKS
        self._gates = gates
        self._peers = peers
        self._client = client
        self._submit = submit
        self._callers = callers
        self._asked: set[Incarnation] = set()
        self._looked_at = time.monotonic()

    def look(self) -> float:
        """Ask those that have calls to answer, if it is time to; after how many seconds to look again."""
        now = time.monotonic()
        left_s = self._looked_at + self._interval_s - now
        if left_s > 0:
            return left_s
        self._looked_at = now
        for caller in self._callers():
            with suppress(LimitError):  # no socket for it now: it is tried again
                self._peers.watch(caller)
        for life, gate in list(self._gates.items()):
            if (gate.num_calls or life in self.since) and life not in self._asked:
                member = self._peers.registry.by_incarnation(life)
                if member is not None and life not in self._peers.registry.ended:
                    self._ask(member.info)
        return self._interval_s

    def lose(self, worker: WorkerInfo) -> None:
        """`worker` is gone, and not suspected any more."""
        self.since.pop(worker.incarnation, None)
        self._asked.discard(worker.incarnation)

    def _ask(self, to: WorkerInfo) -> None:
        self._asked.add(to.incarnation)
        asked_at = time.monotonic()
        try:
            call = self._client.request(to, Heartbeat(), timeout_s=self._limit_s)
        except ZrpcError:
            self._asked.discard(to.incarnation)
            return
        call.add_done_callback(partial(self._on_done, asked_at), inline=True)

    def _on_done(self, asked_at: float, call: Call) -> None:
        """The answer came, or its time is over. Maybe on the thread that reads."""
        life = call.peer.incarnation
        self._asked.discard(life)
        if not call.failed:
            since = self.since.pop(life, None)
            if since is not None:
                text = "%s answers again, after %.1f s: it is not lost, and neither are calls to it"
                self._submit(partial(log.warning, text, call.peer, time.monotonic() - since))
            return
        now = time.monotonic()
        stood_still_here = now - self._looked_at > 2 * self._limit_s
        is_over = life in self._peers.registry.ended or not self._peers.is_here(life)
        if now - asked_at < ALMOST * self._limit_s or stood_still_here or is_over or life in self.since:
            return  # or this worker itself did not run
        self.since[life] = asked_at
        text = (
            "%s does not answer for %.1f s, though its host is there: it stands still (stopped, in a debugger, short "
            "of memory), or its code holds Python's lock. Calls to it end at their time limits, or are answered when "
            "it goes on"
        )
        self._submit(partial(log.warning, text, call.peer, now - asked_at))
