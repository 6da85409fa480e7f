"""A local autograd graph with numbers for nodes, as the scheduler wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zrpc.autograd.functions import RecvInfo, recv_info
from zrpc.autograd.scheduler import NO_NODE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node

_AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # made at run time


class Edge(NamedTuple):
    """Where an output of a node goes: input `slot` of node number `child`, or nowhere (`NO_NODE`)."""

    child: int
    slot: int


def edges_of(roots: Sequence[torch.Tensor]) -> list[tuple[Node, int]]:
    """Where a pass begins that begins with `roots`, none of which is a leaf."""
    return [(root.grad_fn, root.output_nr) for root in roots]  # type: ignore[misc]


def is_leaf(node: Node) -> bool:
    """Whether it is the node of a leaf tensor."""
    return type(node) is _AccumulateGrad


class Graph:
    """All nodes that can be reached from some sources: the roots, and send functions. Receive functions are its ends.

    A source has a number like a node, as if it led to where it begins.

    Attributes:
        nodes: the nodes by number; None for sources.
        edges: the outputs of each node or source.
        numbers: the number of each node.
        leaves: the numbers of the nodes of leaf tensors.
        received: where the tensors of the receive functions that were reached came from.
    """

    def __init__(self) -> None:
        self.nodes: list[Node | None] = []
        self.edges: list[list[Edge]] = []
        self.numbers: dict[Node, int] = {}
        self.leaves: list[int] = []
        self.received: list[RecvInfo] = []

    def children(self) -> list[list[int]]:
        """The graph as the scheduler wants it."""
        return [[edge.child for edge in edges] for edges in self.edges]

    def leaf(self, number: int) -> torch.Tensor:
        """The leaf tensor that the node `number` accumulates for."""
        node: Any = self.nodes[number]
        leaf: torch.Tensor = node.variable
        return leaf

    def add_source(self, edges: Iterable[tuple[Node, int]]) -> int:
        """Add a source with its edges and all they lead to; returns its number."""
        number = len(self.nodes)
        self.nodes.append(None)
        self.edges.append([])
        self.edges[number] = [Edge(self._number(node), slot) for node, slot in edges]
        self._walk()
        return number

    def _number(self, node: Node) -> int:
        number = self.numbers.get(node)
        if number is None:
            number = self.numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return number

    def _walk(self) -> None:
        """Give edges to the nodes that have none yet, and to those they lead to."""
        while len(self.edges) < len(self.nodes):
            number = len(self.edges)
            node = self.nodes[number]
            assert node is not None
            info = recv_info(node)
            if info is not None:
                self.received.append(info)
                self.edges.append([])
                continue
            if is_leaf(node):
                self.leaves.append(number)
            self.edges.append(
                [
                    Edge(NO_NODE, slot) if child is None else Edge(self._number(child), slot)
                    for child, slot in node.next_functions
                ]
            )
