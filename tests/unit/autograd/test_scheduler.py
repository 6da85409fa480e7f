"""The scheduler against its invariants: every node once, on all that leads to it, whatever arrives when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zrpc.autograd.scheduler import NO_NODE, Scheduler, Segment
from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn


@dataclass
class Drawn:
    """A random graph: what leads where, where it begins, and which of its leaves take parts."""

    children: list[list[int]]
    sources: list[int]
    splittable: set[int]


@st.composite
def graphs(draw: DrawFn, max_sources: int = 4, max_nodes: int = 14) -> Drawn:
    """Graphs whose nodes are numbered against the edges: sources first."""
    n_sources = draw(st.integers(1, max_sources))
    n = n_sources + draw(st.integers(0, max_nodes))
    children: list[list[int]] = []
    for node in range(n):
        later = range(max(node + 1, n_sources), n)
        child = st.sampled_from([NO_NODE, *later])
        children.append(draw(st.lists(child, max_size=3)))
    ends = [node for node in range(n_sources, n) if not any(child != NO_NODE for child in children[node])]
    splittable = set(draw(st.lists(st.sampled_from(ends), unique=True))) if ends else set()
    return Drawn(children, list(range(n_sources)), splittable)


@dataclass
class Engine:
    """torch's engine and the hand-over between its calls, on numbers: a node's value is the number of paths to it."""

    graph: Drawn
    whole: list[int]
    values: dict[int, int] = field(default_factory=dict)
    parts: dict[int, int] = field(default_factory=dict)
    handed: dict[int, int] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)

    def run(self, segment: Segment) -> None:
        """As torch's engine: run all that `segment` leads to; if it has cuts, only what leads to them and its ends."""
        wanted = self.leading_to(segment.cuts | segment.ends) if segment.cuts else set(range(len(self.whole)))
        inside = {node: self.handed.pop(node) for node in segment.nodes & self.handed.keys()}
        inside |= {node: 1 for node in segment.starts if node in self.graph.sources}
        for node in range(len(self.whole)):
            if node not in inside or node not in wanted:
                continue
            if node in self.graph.splittable:
                self.parts[node] = self.parts.get(node, 0) + inside[node]
                continue
            assert inside[node] == self.whole[node], f"node {node} runs on a part of its gradient"
            assert node not in self.ran, f"node {node} runs twice"
            assert not segment.nodes or node in segment.nodes, f"node {node} is run by a segment it is not in"
            self.ran.add(node)
            self.values[node] = inside[node]
            for child in self.graph.children[node]:
                if child != NO_NODE:
                    inside[child] = inside.get(child, 0) + inside[node]

    def leading_to(self, targets: frozenset[int]) -> set[int]:
        """The nodes that lead to `targets`, and those themselves."""
        leading = set(targets)
        for node in reversed(range(len(self.whole))):
            if leading.intersection(self.graph.children[node]):
                leading.add(node)
        return leading

    def hand_on(self, segment: Segment) -> None:
        """Give the outputs of the cuts to whom they belong; splittable ends have theirs from the engine."""
        for cut in segment.cuts:
            for child in self.graph.children[cut]:
                if child != NO_NODE and child not in segment.ends:
                    place = self.parts if child in self.graph.splittable else self.handed
                    place[child] = place.get(child, 0) + self.values[cut]


def paths_to(graph: Drawn) -> list[int]:
    """For every node the number of paths from sources to it."""
    paths = [0] * len(graph.children)
    for source in graph.sources:
        paths[source] = 1
    for node, children in enumerate(graph.children):
        for child in children:
            if child != NO_NODE:
                paths[child] += paths[node]
    return paths


@settings(max_examples=400, deadline=None)
@given(graph=graphs(), data=st.data())
def test_every_node_runs_once_on_its_whole_gradient(graph: Drawn, data: st.DataObject) -> None:
    paths = paths_to(graph)
    reachable = {node for node, count in enumerate(paths) if count}
    scheduler = Scheduler(graph.children, graph.sources, graph.splittable)
    engine = Engine(graph, paths)
    to_come = list(data.draw(st.permutations(graph.sources)))
    under_way: list[Segment] = []
    while to_come or under_way:
        assert not scheduler.finished
        if to_come and (not under_way or data.draw(st.booleans())):
            segment: Segment | None = scheduler.arrive(to_come.pop())
        else:
            done = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
            engine.hand_on(done)
            segment = scheduler.complete(done)
        if segment is not None:
            engine.run(segment)
            under_way.append(segment)
    assert scheduler.finished
    assert engine.ran == reachable - graph.splittable
    assert {node: count for node, count in engine.parts.items() if count} == {
        node: paths[node] for node in graph.splittable & reachable
    }


@given(graph=graphs(max_sources=1))
def test_one_source_is_one_segment_without_cuts(graph: Drawn) -> None:
    scheduler = Scheduler(graph.children, graph.sources, graph.splittable)
    segment = scheduler.arrive(0)
    assert segment.starts == (0,)
    assert not segment.cuts
    assert scheduler.complete(segment) is None
    assert scheduler.finished


def test_sources_that_share_only_splittable_leaves_are_not_cut() -> None:
    children = [[2], [3], [4, 4], [4], []]
    scheduler = Scheduler(children, [0, 1], splittable=[4])
    first, second = scheduler.arrive(1), scheduler.arrive(0)
    assert not first.cuts
    assert not second.cuts
    assert scheduler.complete(second) is None
    assert scheduler.complete(first) is None
    assert scheduler.finished


def test_what_waits_for_another_source_is_cut_off() -> None:
    # 0 -> 2 -> {3, 4}; 1 -> 4
    scheduler = Scheduler([[2], [4], [3, 4], [], []], [0, 1])
    first = scheduler.arrive(0)
    assert first.nodes == {0, 2}
    assert first.cuts == {2}
    second = scheduler.complete(first)
    assert second is not None
    assert second.nodes == {3}
    assert scheduler.complete(second) is None
    assert not scheduler.finished
    third = scheduler.arrive(1)
    assert third.nodes == {1, 4}
    assert scheduler.complete(third) is None
    assert scheduler.finished


def test_a_source_comes_once() -> None:
    scheduler = Scheduler([[], []], [0, 1])
    scheduler.arrive(0)
    with pytest.raises(AutogradError, match="not waited for"):
        scheduler.arrive(0)


def test_a_source_that_takes_no_part_is_refused() -> None:
    with pytest.raises(AutogradError, match="takes no part"):
        Scheduler([[1], []], [0]).arrive(1)


def test_a_segment_ends_once() -> None:
    scheduler = Scheduler([[]], [0])
    segment = scheduler.arrive(0)
    scheduler.complete(segment)
    with pytest.raises(AutogradError, match="not under way"):
        scheduler.complete(segment)
