"""What a worker answers to observers. All of it runs on the control thread, and is bounded.

| question | about | answer |
|---|---|---|
| `ping` | | `time`: the clock of the worker, in seconds since 1970 |
| `members` | | the members, as in `Welcome` |
| `status` | | see `zrpc.sight.snapshot` |
| `stacks` | | see `zrpc.sight.stacks` |
| `trace` | `seconds` | what happens from now on, again and again; see `zrpc.sight.tracing` |
| `leave` | | nothing: the observer is forgotten |
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from zrpc.sight import snapshot, stacks
from zrpc.sight.tracing import Tracing

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent
    from zrpc.agent.observed import Question
    from zrpc.ids import Incarnation


class Sight:
    """Answers for one worker.

    Args:
        agent: the worker.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._began = time.time()
        self._tracing = Tracing(agent.observed)
        agent.observed.answer_with(self._answer, self._on_gone, self._tracing.run_due)

    @property
    def is_tracing(self) -> bool:
        """Whether calls are told to an observer. Any thread."""
        return self._tracing.is_on

    def _answer(self, question: Question) -> None:
        if question.what == "trace":
            self._tracing.ask(question)
        elif question.what == "leave":
            self._agent.observed.forget(question.life)
        else:
            question.answer(self._seen(question.what))

    def _seen(self, what: str) -> dict[str, Any]:
        if what == "ping":
            return {"time": time.time()}
        if what == "members":
            return {"members": snapshot.members(self._agent.observed)}
        if what == "status":
            return snapshot.status(self._agent, self._began)
        if what == "stacks":
            return {**snapshot.worker(self._agent, self._began), "threads": stacks.stacks()}
        return {"error": f"the zrpc of this worker does not know the question {what[:32]!r}: install the same on both"}

    def _on_gone(self, life: Incarnation) -> None:
        self._tracing.forget(life)


def install(agent: Agent) -> None:
    """Have `agent` answer observers."""
    agent.extensions[Sight] = Sight(agent)
