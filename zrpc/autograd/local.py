"""The local part of a backward pass: a graph, its scheduler, and torch's engine to run segments.

The class knows nothing of other workers: gradients that receive functions got go to a callback, and so do those of
leaves. With one source, the usual case, all of it is one plain engine call. Sources that lead to leaves alone are none
that the scheduler must know of (`zrpc.autograd.lone_sends`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler import record_function

from zrpc.autograd.cut import fit, fit_leaf
from zrpc.autograd.engine import Job, execute
from zrpc.autograd.functions import SEND_NAME, Gradients, LoneNode, RecvInfo, SendFunction
from zrpc.autograd.graph import Graph, edges_of
from zrpc.autograd.leaves import Taps
from zrpc.autograd.lone_sends import LoneSends
from zrpc.autograd.scheduler import NO_NODE, Scheduler, Segment
from zrpc.errors import AutogradError
from zrpc.staging import handover

if TYPE_CHECKING:
    from zrpc.autograd.accumulate import Taken
    from zrpc.ids import GlobalId, Incarnation
    from zrpc.staging.streams import Mark

_profiler_enabled: Any = torch.autograd._profiler_enabled
_nothing = nullcontext()

OnReceived = Callable[[RecvInfo, Gradients], None]


class LocalPass:
    """One backward pass over one local graph.

    Any thread may call `run_roots` and `run_send`, also at the same time. The lock owns the scheduler and the gradients
    on their way; segments run outside of it.

    Args:
        roots: scalar tensors to begin with; empty where the pass began elsewhere.
        sends: the send functions that will get gradients.
        retain_graph: keep what nodes saved, for another pass.
        on_received: is given what a receive function got; runs inside torch's engine.
        on_leaves: is given the gradients of leaves that one engine call made.
        is_left_alone: leaves that it is true of are left to torch, which adds to `.grad` and runs hooks that cannot be
            seen.
    """

    def __init__(
        self,
        roots: Sequence[torch.Tensor],
        sends: Mapping[GlobalId, SendFunction],
        retain_graph: bool,
        on_received: OnReceived,
        on_leaves: Callable[[list[Taken]], None],
        is_left_alone: Callable[[torch.Tensor], bool] = lambda _: False,
    ) -> None:
        self._roots = tuple(roots)
        self._sends = dict(sends)  # they keep the nodes alive
        self._retain_graph = retain_graph
        self._on_received = on_received
        self._on_leaves = on_leaves
        self._lock = threading.Lock()
        self._arrived: dict[int, Gradients] = {}  # of sources that are to start
        self._handed: dict[int, list[tuple[int, torch.Tensor | None]]] = {}  # node: input slots and gradients
        self._marks: list[
            Mark
        ] = []  # in the streams of threads that brought or made gradients; the next to run joins them
        self._graph = Graph()
        self._root = self._graph.add_source(edges_of(roots)) if roots else NO_NODE
        self._lone = LoneSends(self._sends, even_operators=not _needs_engine())
        self._numbers = {
            message_id: self._graph.add_source(send.edges)
            for message_id, send in self._sends.items()
            if message_id not in self._lone
        }
        for message_id, send in self._lone.part_with(self._graph.numbers).items():
            self._numbers[message_id] = self._graph.add_source(send.edges)
        self._taps = Taps(is_left_alone)
        self._splittable = frozenset(
            number for number in self._graph.leaves if self._taps.open(self._graph.nodes[number])
        )
        sources = [*self._numbers.values(), *([self._root] if roots else [])]
        self._scheduler = Scheduler(self._graph.children, sources, self._splittable)

    @property
    def finished(self) -> bool:
        """Whether every node has run."""
        with self._lock:
            return self._scheduler.finished and not self._lone

    def awaited(self) -> set[Incarnation]:
        """The lives from which gradients are still to come."""
        with self._lock:
            numbers = self._scheduler.awaited
            lone = self._lone.lives()
        return lone | {self._sends[message_id].to for message_id, number in self._numbers.items() if number in numbers}

    def look_ahead(self) -> None:
        """Do now, while gradients are on their way, what `run_send` need not do then."""
        with self._lock:
            for node in self._lone.nodes():
                self._taps.open(node)

    def run_roots(self) -> None:
        """Run what the roots lead to, as far as it needs no other source."""
        ones = [_ones(root) for root in self._roots]
        with self._lock:
            segment = self._arrive(self._root, ones)
        self._run(segment)

    def run_send(self, message_id: GlobalId, gradients: Gradients) -> None:
        """The gradients of a send function are here: run what is ready now.

        Raises:
            AutogradError: it takes no part in this pass, or has had its gradients; or there are too few or too many.
        """
        job = Job(self._retain_graph)
        taken: list[Taken] = []
        segment: Segment | None = None
        with record_function(SEND_NAME) if _profiler_enabled() else _nothing, self._lock:
            lone = self._lone.take(message_id)
            operator = None if lone is None else lone.operator
            if lone is None:
                segment = self._arrive(self._numbers.get(message_id, NO_NODE), gradients)
            elif operator is None:
                self._begin_at_leaves(job, taken, lone, gradients)
            else:
                _check_count(gradients, lone.edges)
        if lone is not None and operator is not None:
            self._run_operator(lone, operator, gradients)
            return
        del gradients  # one that nobody else holds need not be copied
        if lone is None:
            self._run(segment)
        else:
            run = _SegmentRun(self, job, taken)
            execute(job, run)
            if run.taken:
                self._on_leaves(run.taken)

    def close(self) -> None:
        """Take the taps off the leaves. For when nothing runs any more."""
        self._taps.close()

    # ---- running ---------------------------------------------------------------------------------------------------

    def deliver(self, info: RecvInfo, gradients: Gradients) -> None:
        """See `Run.deliver`."""
        self._on_received(info, gradients)

    def _run_operator(self, send: SendFunction, operator: LoneNode, gradients: Gradients) -> None:
        made = operator.run(gradients[0])
        if not self._retain_graph:
            send.spend()
        self._on_received(operator.info, made)

    def _arrive(self, source: int, gradients: Gradients) -> Segment:
        """A source has its gradients: what to run now. If there is none for some edge, they are handed on by hand.

        Call it under the lock.
        """
        if source != NO_NODE:
            _check_count(gradients, self._graph.edges[source])
        segment = self._scheduler.arrive(source, by_hand=any(gradient is None for gradient in gradients))
        self._arrived[source] = gradients
        if handover.streams is not None:
            self._marks.append(handover.streams.mark())
        return segment

    def _run(self, segment: Segment | None) -> None:
        while segment is not None:
            with self._lock:
                for mark in self._marks:
                    mark.join()
                job, taken = self._job(segment)
            run = _SegmentRun(self, job, taken)
            outputs = execute(job, run)
            with self._lock:
                self._hand_on(segment, outputs, run.taken)
                if handover.streams is not None:
                    self._marks.append(handover.streams.mark())
                segment = self._scheduler.complete(segment)
            if run.taken:
                self._on_leaves(run.taken)

    def _job(self, segment: Segment) -> tuple[Job, list[Taken]]:
        """What to do for `segment`, and what needs no doing: gradients of splittable leaves. Call it under the lock."""
        nodes = self._graph.nodes
        job = Job(self._retain_graph)
        taken: list[Taken] = []
        for number in segment.starts:
            if number in self._arrived and number not in segment.cuts:
                self._begin(job, taken, number)
        if self._handed:
            for number in segment.nodes & self._handed.keys():
                job.begin_with(nodes[number], self._handed.pop(number), even_absent=number in segment.starts)
        if segment.cuts:
            cuts = {number: nodes[number] for number in segment.cuts if nodes[number] is not None}
            job.end_at(cuts, [nodes[number] for number in segment.ends])
        return job, taken

    def _begin(self, job: Job, taken: list[Taken], source: int) -> None:
        """Begin where `source` leads to. Call it under the lock."""
        for (child, slot), gradient in zip(self._graph.edges[source], self._arrived.pop(source), strict=True):
            assert gradient is not None  # else the source is a cut
            if child in self._splittable:
                taken.append((self._graph.leaf(child), fit_leaf(gradient, self._graph.nodes[child], slot)))
            else:
                job.begin_at(self._graph.nodes[child], slot, gradient)

    def _begin_at_leaves(self, job: Job, taken: list[Taken], send: SendFunction, gradients: Gradients) -> None:
        """The same for a send function that leads to lone leaves. Call it under the lock."""
        _check_count(gradients, send.edges)
        hooked: dict[Any, list[tuple[int, torch.Tensor | None]]] = {}
        for (node, slot), gradient in zip(send.edges, gradients, strict=True):
            if not self._taps.open(node):
                hooked.setdefault(node, []).append((slot, gradient))
            elif gradient is not None:
                leaf: Any = node
                taken.append((leaf.variable, fit_leaf(gradient, node, slot)))
        for node, handed in hooked.items():
            job.begin_with(node, handed, even_absent=True)

    def _hand_on(self, segment: Segment, outputs: Mapping[int, Gradients], taken: list[Taken]) -> None:
        """Give the outputs of the cuts of `segment` to the nodes they lead to. Call it under the lock.

        Splittable nodes have no hooks, so they need no run: theirs are added to `taken`.
        """
        for number in segment.cuts:
            values = self._arrived.pop(number) if number in self._arrived else outputs[number]
            for (child, slot), gradient in zip(self._graph.edges[number], values, strict=True):
                if child == NO_NODE:
                    continue
                fitting = None if gradient is None else fit(gradient, self._graph.nodes[child], slot)
                if child not in self._splittable:
                    self._handed.setdefault(child, []).append((slot, fitting))
                elif fitting is not None:
                    taken.append((self._graph.leaf(child), fitting))


class _SegmentRun:
    """One engine call of a `LocalPass`, as nodes and hooks see it."""

    def __init__(self, local: LocalPass, job: Job, taken: list[Taken]) -> None:
        self.taken = taken
        self.deliver = local.deliver
        self._without = [getattr(node, "variable", None) for node, _ in job.absent]

    def take(self, leaf: torch.Tensor, gradient: torch.Tensor) -> None:
        """See `Run.take`. Appending is atomic: CUDA nodes run on threads of their own."""
        if not any(leaf is one for one in self._without):  # what hooks make of no gradient is none
            self.taken.append((leaf, gradient))


def _needs_engine() -> bool:
    """Whether somebody looks at what torch's engine does, or this thread is inside it: nodes act otherwise there."""
    return _profiler_enabled() or torch.is_anomaly_enabled() or torch._C._current_graph_task_id() != -1


def _check_count(gradients: Gradients, edges: Sequence[object]) -> None:
    if len(gradients) != len(edges):
        raise AutogradError(f"{len(gradients)} gradients came for {len(edges)} tensors")


def _ones(root: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(root, memory_format=torch.contiguous_format)
