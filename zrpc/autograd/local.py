"""The local part of a backward pass: a graph, its scheduler, and torch's engine to run segments.

The class knows nothing of other workers: gradients that receive functions got go to a callback, and so do those of
leaves. With one source, the usual case, all of it is one plain engine call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zrpc.autograd.cut import fit
from zrpc.autograd.engine import Job, execute
from zrpc.autograd.functions import Gradients, RecvInfo, SendFunction, source_gradient
from zrpc.autograd.graph import ROOTS, Graph
from zrpc.autograd.leaves import close_tap, open_tap
from zrpc.autograd.scheduler import NO_NODE, Scheduler, Segment
from zrpc.staging import handover

if TYPE_CHECKING:
    from zrpc.autograd.accumulate import Taken
    from zrpc.ids import GlobalId
    from zrpc.staging.streams import Mark

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
        self._sends = dict(sends)  # with their outputs, which keep the nodes alive
        self._retain_graph = retain_graph
        self._on_received = on_received
        self._on_leaves = on_leaves
        self._lock = threading.Lock()
        self._gradients: dict[GlobalId, Gradients] = {}
        self._handed: dict[int, list[tuple[int, torch.Tensor | None]]] = {}  # node: input slots and gradients
        self._marks: list[Mark] = []  # in the streams of each segment that has run
        self._graph = Graph()
        self._graph.add_roots(roots)
        self._numbers = {message_id: self._graph.add_send(send.node) for message_id, send in sends.items()}
        self._message_ids = {number: message_id for message_id, number in self._numbers.items()}
        self._tapped: list[Any] = []
        self._splittable = self._open_taps(is_left_alone)
        sources = [*self._message_ids, *([ROOTS] if roots else [])]
        self._scheduler = Scheduler(self._graph.children(), sources, self._splittable)

    @property
    def finished(self) -> bool:
        """Whether every node has run."""
        with self._lock:
            return self._scheduler.finished

    def awaited(self) -> set[int]:
        """The ranks from which gradients are still to come."""
        with self._lock:
            numbers = self._scheduler.awaited - {ROOTS}
        return {self._sends[self._message_ids[number]].to for number in numbers}

    def run_roots(self) -> None:
        """Run what the roots lead to, as far as it needs no other source."""
        with self._lock:
            segment = self._scheduler.arrive(ROOTS)
        self._run(segment)

    def run_send(self, message_id: GlobalId, gradients: Gradients) -> None:
        """The gradients of a send function are here: run what is ready now.

        Raises:
            AutogradError: it takes no part in this pass, or has had its gradients.
        """
        with self._lock:
            segment = self._scheduler.arrive(self._numbers.get(message_id, NO_NODE))
            self._gradients[message_id] = gradients
        self._run(segment)

    def close(self) -> None:
        """Take the taps off the leaves. For when nothing runs any more."""
        tapped, self._tapped = self._tapped, []
        for node in tapped:
            close_tap(node)

    # ---- as a run: asked by nodes and hooks ------------------------------------------------------------------------

    def gradients_of(self, message_id: GlobalId) -> Gradients:
        """See `Run.gradients_of`."""
        return self._gradients.pop(message_id)

    def deliver(self, info: RecvInfo, gradients: Gradients) -> None:
        """See `Run.deliver`."""
        self._on_received(info, gradients)

    # ---- running ---------------------------------------------------------------------------------------------------

    def _run(self, segment: Segment | None) -> None:
        while segment is not None:
            with self._lock:
                job = self._job(segment)
                marks = list(self._marks)
            for mark in marks:
                mark.join()
            run = _SegmentRun(self, job)
            outputs = execute(job, run)
            with self._lock:
                self._hand_on(segment, outputs, run.taken)
                if handover.streams is not None:
                    self._marks.append(handover.streams.mark())
                segment = self._scheduler.complete(segment)
            if run.taken:
                self._on_leaves(run.taken)

    def _job(self, segment: Segment) -> Job:
        """What to do for `segment`. Call it under the lock."""
        nodes = self._graph.nodes
        job = Job(self._retain_graph)
        for number in segment.starts:
            if number in self._message_ids:
                job.begin_at(nodes[number], 0, source_gradient())
        if ROOTS in segment.starts and ROOTS not in segment.cuts:
            for root in self._roots:
                job.begin_at(root.grad_fn, root.output_nr, _ones(root))
        for number in segment.nodes & self._handed.keys():
            handed = self._handed.pop(number)
            defined = [(slot, gradient) for slot, gradient in handed if gradient is not None]
            for slot, gradient in defined:
                job.begin_at(nodes[number], slot, gradient)
            if not defined and number in segment.starts:
                job.absent.append((nodes[number], handed[0][0]))
        job.cuts = {number: nodes[number] for number in segment.cuts if number != ROOTS}
        if job.cuts:
            job.ends = [nodes[number] for number in segment.ends]
        return job

    def _hand_on(self, segment: Segment, outputs: Mapping[int, Gradients], taken: list[Taken]) -> None:
        """Give the outputs of the cuts of `segment` to the nodes they lead to. Call it under the lock.

        Splittable nodes have no hooks, so they need no run: theirs are added to `taken`, unless torch's engine ran
        them.
        """
        for number in segment.cuts:
            values = [_ones(root) for root in self._roots] if number == ROOTS else outputs[number]
            for (child, slot), gradient in zip(self._graph.edges[number], values, strict=True):
                if child == NO_NODE:
                    continue
                fitting = None if gradient is None else fit(gradient, self._graph.nodes[child], slot)
                if child not in self._splittable:
                    self._handed.setdefault(child, []).append((slot, fitting))
                elif fitting is not None and child not in segment.ends:
                    taken.append((self._graph.leaf(child), fitting))

    def _open_taps(self, is_left_alone: Callable[[torch.Tensor], bool]) -> frozenset[int]:
        """Tap the leaves; returns those that may run on parts of their gradient."""
        splittable = []
        for number in self._graph.leaves:
            if is_left_alone(self._graph.leaf(number)):
                continue
            node = self._graph.nodes[number]
            self._tapped.append(node)
            if not open_tap(node):  # type: ignore[arg-type]  # only ROOTS has none
                splittable.append(number)
        return frozenset(splittable)


class _SegmentRun:
    """One engine call of a `LocalPass`, as nodes and hooks see it."""

    def __init__(self, local: LocalPass, job: Job) -> None:
        self.taken: list[Taken] = []
        self.gradients_of = local.gradients_of
        self.deliver = local.deliver
        self._without = [getattr(node, "variable", None) for node, _ in job.absent]

    def take(self, leaf: torch.Tensor, gradient: torch.Tensor) -> None:
        """See `Run.take`. Appending is atomic: CUDA nodes run on threads of their own."""
        if not any(leaf is one for one in self._without):  # what hooks make of no gradient is none
            self.taken.append((leaf, gradient))


def _ones(root: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(root, memory_format=torch.contiguous_format)
