"""A worker as observers see it: commands that look into its group and are no members of it.

What: an observer asks (`Look`), and is answered on the control thread, which waits for nothing: also while all handler
threads are stuck. Nothing is counted for observers on the way of messages. What is told is read from what is there.

Invariants: an observer is on no list of members, has no rank and is not waited for. What is kept of one is the way to
it, for `LEASE_S` after its last question.

Threads: `_on_look` is called by the thread that reads, and hands on; the rest belongs to the control thread.

Failure: an observer that cannot be reached is forgotten. One whose key may not claim `OBSERVER_NAME` is not answered,
which the log says.
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc import finalizers
from zrpc.exception_text import log_error
from zrpc.transport.traffic import traffic
from zrpc.wire.envelope import Envelope
from zrpc.wire.observing import Look, Seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.call import Call
    from zrpc.agent.client import Client
    from zrpc.agent.gate import Gates
    from zrpc.agent.peers import Peers
    from zrpc.agent.request import Request
    from zrpc.agent.server import Server
    from zrpc.control import ControlThread
    from zrpc.ids import Incarnation
    from zrpc.membership.group import Member
    from zrpc.transport.carrier import Carrier
    from zrpc.transport.endpoint import Endpoint
    from zrpc.transport.traffic import Traffic

    Answer = Callable[["Question"], None]

log = logging.getLogger("zrpc")

LEASE_S = 30.0
"""So long after its last question the way to an observer is kept."""
OBSERVERS_MAX = 64
_LEFT = "it looks no more"


class Question:
    """What one observer asked. Of the control thread.

    Attributes:
        life: of the observer.
        call_id: its number of the question, which all answers have.
        what: see `Look`.
        about: see `Look`.
    """

    def __init__(self, observed: Observed, life: Incarnation, call_id: int, message: Look) -> None:
        self._observed = observed
        self.life = life
        self.call_id = call_id
        self.what = message.what
        self.about = message.about

    def answer(self, seen: dict[str, Any]) -> bool:
        """Tell the observer; false: it is gone. It may be told more than once."""
        return self._observed.send(self.life, Envelope(Seen(seen), self.call_id))


class Observed:
    """What observers see of one worker, and the way to them.

    Args:
        endpoint: the way.
        carrier: likewise.
        peers: who is here.
        client: the calls out.
        server: the requests in.
        gates: the windows.
        control: where all is answered.
    """

    def __init__(
        self, endpoint: Endpoint, carrier: Carrier, peers: Peers, client: Client, server: Server, gates: Gates,
        control: ControlThread,
    ) -> None:  # fmt: skip
        self._endpoint = endpoint
        self._carrier = carrier
        self._peers = peers
        self._client = client
        self._server = server
        self._gates = gates
        self._control = control
        self._answer: Answer | None = None
        self._on_gone: Callable[[Incarnation], None] = lambda _: None
        self._due: Callable[[], float] = lambda: math.inf
        self._until: dict[Incarnation, float] = {}
        self._refused: set[Incarnation] = set()

    def answer_with(self, answer: Answer, on_gone: Callable[[Incarnation], None], run_due: Callable[[], float]) -> None:
        """Say what answers questions; once, before the worker joins. All on the control thread: none may wait.

        Args:
            answer: takes each question.
            on_gone: is told of an observer that is gone.
            run_due: does what is due; after how many seconds more will be.
        """
        self._answer, self._on_gone, self._due = answer, on_gone, run_due
        self._server.observed_by(self._on_look)

    # ---- what there is to see ----------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """All that this worker takes for members, itself included."""
        found = (self._peers.registry.member(info.id) for info in self._peers.registry.all())
        return [member for member in found if member is not None]

    def ended(self) -> dict[Incarnation, str]:
        """The lives that were over last, and why."""
        return dict(self._peers.registry.ended)

    def draining(self) -> set[Incarnation]:
        """The members that take no new calls."""
        return set(self._peers.draining)

    def calls(self) -> list[Call]:
        """The calls of this worker under way, the oldest first."""
        return self._client.calls.all()

    @property
    def num_made(self) -> int:
        """How many requests this worker has made so far, those of zrpc's protocols included."""
        return self._client.num_made

    def requests(self) -> list[Request[Any]]:
        """The requests that this worker has not answered, the oldest first."""
        return self._server.requests()

    def is_queued(self, request: Request[Any]) -> bool:
        """Whether that request waits for a handler thread."""
        return request in self._server.queue

    def windows(self) -> list[tuple[Incarnation, dict[str, int]]]:
        """What is on the way to which life, and waits for room or for it to read."""
        return [
            (life, {**gate.seen(), "queued_nbytes": self._carrier.queued_nbytes(life)})
            for life, gate in list(self._gates.items())
        ]

    def shared_memory(self) -> dict[str, int]:
        """How much shared memory this worker holds."""
        return self._carrier.shared_counts()

    def traffic(self) -> list[Traffic]:
        """Its TCP connections."""
        return traffic(self._endpoint.local_ports(), self._endpoint.remote_addresses())

    def trace(
        self, on_begun: Callable[[Call], None] | None,
        on_answer: Callable[[Request[Any], BaseException | None], None] | None,
    ) -> None:  # fmt: skip
        """Tell of calls out that begin, and of requests in that are answered, from now on; None: do not."""
        self._client.calls.trace(on_begun)
        self._server.trace(on_answer)

    # ---- observers ---------------------------------------------------------------------------------------------------

    def send(self, life: Incarnation, envelope: Envelope) -> bool:
        """Send to an observer; false: it is gone, and forgotten."""
        try:
            self._carrier.send(life, envelope)
        except Exception as error:  # it ended, or cannot be reached from here
            log.info("an observer is not told what it asked: %s", error)
            self.forget(life)
            return False
        return True

    def forget(self, life: Incarnation) -> None:
        """An observer is gone."""
        if self._until.pop(life, None) is not None:
            self._endpoint.remove_peer(life, _LEFT)
            self._on_gone(life)

    def run_due(self) -> float:
        """Forget observers that ask no more, and do what is due; after how many seconds more will be."""
        if not self._until:
            return math.inf
        now = time.monotonic()
        for life in [life for life, until in self._until.items() if now >= until]:
            self.forget(life)
        return min(self._due(), LEASE_S)

    def _on_look(self, life: Incarnation, envelope: Envelope) -> None:
        self._control.submit(partial(self._take, life, envelope))

    def _take(self, life: Incarnation, envelope: Envelope) -> None:
        message = envelope.message
        if not isinstance(message, Look) or self._answer is None or life in self._refused:
            return
        if life not in self._until:
            if (reason := self._endpoint.why_not_observe(life)) is not None or len(self._until) >= OBSERVERS_MAX:
                self._refused = {*list(self._refused)[-OBSERVERS_MAX:], life}
                log.warning("an observer is not answered: %s", reason or f"there are {OBSERVERS_MAX} already")
                return
            self._endpoint.add_peer(life, message.address)
        self._until[life] = time.monotonic() + LEASE_S
        question = Question(self, life, envelope.call_id, message)
        try:
            self._answer(question)
        except Exception as error:
            finalizers.defer(partial(log_error, log, "a question of an observer failed", error=error))
            question.answer({"error": f"{type(error).__name__}: {error}"})
