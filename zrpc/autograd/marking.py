"""SMART mode: finding out which send functions will get gradients, before the pass.

In FAST mode every send function of a context is taken to get gradients, and a result that is never used makes the pass
wait for ever. In SMART mode a first walk follows the graph from the roots: a receive function that is reached on one
worker marks the send function on another that it belongs to, and the walk goes on from there. A `MarkSends` is answered
once all that it leads to is marked; every send function belongs to one receive function and the graph has no circle, so
that ends. Then every worker knows what to wait for.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

from zrpc.autograd.graph import Graph, edges_of
from zrpc.errors import AutogradError
from zrpc.ids import GlobalId, Incarnation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch

    from zrpc.autograd.functions import SendFunction

Further = dict[Incarnation, list[GlobalId]]
"""By the worker's life, the send functions elsewhere that take part too."""


class Marking:
    """What one pass marks on one worker. Any thread may use it; the lock owns the graph."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graph = Graph()
        self._marked: dict[GlobalId, SendFunction] = {}
        self._told = 0

    def marked(self) -> dict[GlobalId, SendFunction]:
        """The send functions here that take part, as far as known."""
        with self._lock:
            return dict(self._marked)

    def begin(self, roots: Sequence[torch.Tensor]) -> Further:
        """The pass begins here with `roots`."""
        with self._lock:
            self._graph.add_source(edges_of(roots))
            return self._further()

    def mark(self, message_ids: Iterable[GlobalId], sends: Mapping[GlobalId, SendFunction]) -> Further:
        """Send functions of this worker, whose all are `sends`, take part.

        Raises:
            AutogradError: there is no such send function.
        """
        with self._lock:
            for message_id in message_ids:
                function = sends.get(message_id)
                if function is None:
                    raise AutogradError(f"there is no send function {message_id} in this context")
                self._marked[message_id] = function
                self._graph.add_source(function.edges)
            return self._further()

    def _further(self) -> Further:
        found: defaultdict[Incarnation, list[GlobalId]] = defaultdict(list)
        for info in self._graph.received[self._told :]:
            found[info.source].append(info.message_id)
        self._told = len(self._graph.received)
        return dict(found)


class Countdown:
    """Calls `done(error)` once: at the first error, or when `step` was called without one as often as expected."""

    def __init__(self, steps: int, done: Callable[[BaseException | None], None]) -> None:
        self._lock = threading.Lock()
        self._left = steps
        self._done = done
        if not steps:
            done(None)

    def step(self, error: BaseException | None) -> None:
        """One of the steps is over, well or not."""
        with self._lock:
            if not self._left:
                return
            self._left = 0 if error is not None else self._left - 1
            last = not self._left
        if last:
            self._done(error)
