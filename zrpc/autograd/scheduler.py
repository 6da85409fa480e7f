"""Which nodes of a local graph may run, and when: the decisions of a backward pass, without tensors.

A worker's part of a backward pass begins at several *sources*: the roots, and every send function that gets gradients
from elsewhere. They arrive at different times, and what one of them leads to may be needed before the next one can
arrive (A calls B, uses the result in a call to C, and so on). Yet every node must run once, on its whole gradient:
tensor hooks and custom functions see it.

A node is *ready* when all nodes that lead to it have run. What becomes ready at once is run as one *segment*: one call
of torch's engine, which starts at some nodes and runs what follows. The engine cannot stop before a node that is not
ready: either it runs the tensor hooks of that node on the part of the gradient it has, or it does not compute that part
at all. So a node with an edge that leaves its segment is a *cut*: it runs as the last node of its segment, and its
outputs are taken from it by hand and handed to the nodes they belong to, which are then ready, or wait for more. A node
that a cut leads to is not in the same segment, so its other producers become cuts too, until nothing changes.

*Splittable* nodes are the exception: leaves without hooks, which merely add up what they get. They take part of a
gradient in any segment, or by hand, so parameters that many micro-batches share cut nothing. But the engine, told to
run some ends, runs every node it comes across that leads to one of them, ready or not. Where nodes that wait, behind a
cut, lead to a splittable node too, it is therefore no end of that segment, and what leads to it becomes a cut.

Invariants, kept by the tests: every node is in exactly one segment, after all nodes that lead to it; a segment without
cuts contains all that its nodes lead to; two segments under way at once share no node that is not splittable.

Rejected: capturing the gradient of the waiting node (`torch.autograd.grad` with its edge as input) runs its hooks once
for every part; one engine call with send functions that block until their gradient is there can deadlock, for the
engine has one thread for all CPU nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NO_NODE = -1
"""Child of an output that leads nowhere."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """What one engine call runs.

    Attributes:
        starts: the nodes to start from: sources, and nodes that have all of their gradients by hand.
        cuts: the nodes to stop at, whose outputs are handed on by hand; none: run all that the starts lead to.
        ends: where else to stop, if there are cuts: nodes without children, splittable ones among them.
        nodes: all nodes it runs that are not splittable. Left empty with a single source: all there are.
    """

    starts: tuple[int, ...]
    cuts: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()
    nodes: frozenset[int] = frozenset()


class Scheduler:
    """Plans the segments of one backward pass on one worker. Not thread-safe; segments may run at the same time.

    Args:
        children: for every node, the child each of its outputs leads to, or `NO_NODE`. The graph has no circle.
        sources: the nodes whose arrival is waited for. Nothing leads to them; all others can be reached from them.
        splittable: nodes without children that may run on parts of their gradient, as often as parts come.
    """

    def __init__(
        self, children: Sequence[Sequence[int]], sources: Iterable[int], splittable: Iterable[int] = ()
    ) -> None:
        self._children = children
        self._awaited = set(sources)
        self._splittable = frozenset(splittable)
        self._under_way: set[Segment] = set()
        self._simple = len(self._awaited) == 1
        self._waits_for: list[int] = []
        self._left = 0
        if not self._simple:
            self._count()

    @property
    def awaited(self) -> frozenset[int]:
        """The sources that have not arrived."""
        return frozenset(self._awaited)

    @property
    def finished(self) -> bool:
        """Whether everything has run."""
        return not self._awaited and not self._under_way and not self._left

    def arrive(self, source: int, *, by_hand: bool = False) -> Segment:
        """The gradients of `source` are here: what to run now. Report its end with `complete`.

        Args:
            source: what arrived.
            by_hand: make a cut of it.

        Raises:
            AutogradError: `source` is not waited for, or arrived before.
        """
        if source not in self._awaited:
            raise AutogradError(f"source {source} is not waited for: it has arrived before, or takes no part")
        if self._simple and by_hand:
            self._simple = False
            self._count()
        self._awaited.remove(source)
        if self._simple:
            return self._begin(Segment((source,)))
        return self._begin(self._plan([source], {source} if by_hand else set()))

    def complete(self, segment: Segment) -> Segment | None:
        """`segment` has run and the outputs of its cuts are handed on: what to run next, if anything became ready."""
        if segment not in self._under_way:
            raise AutogradError(f"{segment} is not under way")
        self._under_way.remove(segment)
        ready: dict[int, None] = {}  # in the order in which they become so
        for cut in segment.cuts:
            for child in self._children[cut]:
                if child != NO_NODE and child not in self._splittable:
                    self._waits_for[child] -= 1
                    if not self._waits_for[child]:
                        ready[child] = None
        return self._begin(self._plan(list(ready), set())) if ready else None

    def _count(self) -> None:
        """How many edges lead to each node, and how many nodes there are to run."""
        self._waits_for = [0] * len(self._children)
        seen = set(self._awaited)
        stack = list(seen)
        while stack:
            for child in self._children[stack.pop()]:
                if child != NO_NODE and child not in self._splittable:
                    self._waits_for[child] += 1
                    if child not in seen:
                        seen.add(child)
                        stack.append(child)
        self._left = len(seen)

    def _begin(self, segment: Segment) -> Segment:
        self._under_way.add(segment)
        return segment

    def _plan(self, starts: list[int], cuts: set[int]) -> Segment:
        """The largest segment that begins with `starts`, which are ready; its nodes count as run.

        `cuts` are to be some of its cuts.
        """
        behind = self._behind(cuts)
        while True:
            nodes = self._closure(starts, cuts)
            more = {node for node in nodes - cuts if self._must_end(node, nodes, behind)}
            if not more:
                break
            cuts |= more
            behind = self._behind(cuts & nodes)
        cuts &= nodes
        for node in nodes:
            self._waits_for[node] = 0
        self._left -= len(nodes)
        ends = self._ends(nodes - cuts) if cuts else ()
        return Segment(tuple(starts), frozenset(cuts), frozenset(ends), frozenset(nodes))

    def _closure(self, starts: list[int], cuts: set[int]) -> set[int]:
        """What becomes ready when `starts` run and nothing is handed on from `cuts`."""
        nodes = set(starts)
        got: dict[int, int] = {}
        stack = list(starts)
        while stack:
            node = stack.pop()
            if node in cuts:
                continue
            for child in self._children[node]:
                if child == NO_NODE or child in self._splittable:
                    continue
                got[child] = got.get(child, 0) + 1
                if got[child] == self._waits_for[child]:
                    nodes.add(child)
                    stack.append(child)
        return nodes

    def _must_end(self, node: int, nodes: set[int], behind: set[int]) -> bool:
        """Whether a segment of `nodes` cannot go on after `node`. `behind` are the nodes that lie behind its cuts."""
        return any(
            child in behind if child in self._splittable else child not in nodes
            for child in self._children[node]
            if child != NO_NODE
        )

    def _behind(self, cuts: set[int]) -> set[int]:
        """What nodes that follow `cuts`, and are not splittable themselves, lead to."""
        stack = [child for cut in cuts for child in self._children[cut] if child not in self._splittable]
        seen = set()
        while stack:
            node = stack.pop()
            if node != NO_NODE and node not in seen:
                seen.add(node)
                stack += self._children[node]
        return seen

    def _ends(self, inner: set[int]) -> set[int]:
        """Where a segment ends that does not end with a cut; `inner` are its nodes but the cuts."""
        ends: set[int] = set()
        for node in inner:
            children = [child for child in self._children[node] if child != NO_NODE]
            ends.update(self._splittable.intersection(children))
            if not children:
                ends.add(node)
        return ends
