"""A local autograd graph with numbers for nodes, as the scheduler wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zrpc.autograd.functions import RecvInfo, recv_info
from zrpc.autograd.scheduler import NO_NODE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node

_AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # made at run time


Edge = tuple[int, int]
"""Where an output of a node goes: the number of a node, or `NO_NODE`, and which of its inputs."""


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
        children: the same without the inputs, as the scheduler wants it.
        numbers: the number of each node.
        leaves: the numbers of the nodes of leaf tensors.
        received: where the tensors of the receive functions that were reached came from.
    """

    def __init__(self) -> None:
        self.nodes: list[Node | None] = []
        self.edges: list[list[Edge]] = []
        self.children: list[list[int]] = []
        self.numbers: dict[Node, int] = {}
        self.leaves: list[int] = []
        self.received: list[RecvInfo] = []

    def leaf(self, number: int) -> torch.Tensor:
        """The leaf tensor that the node `number` accumulates for."""
        node: Any = self.nodes[number]
        leaf: torch.Tensor = node.variable
        return leaf

    def add_source(self, edges: Iterable[tuple[Node, int]]) -> int:
        """Add a source with its edges and all they lead to; returns its number."""
        source = len(self.nodes)
        self.nodes.append(None)
        self._follow(edges)
        while len(self.edges) < len(self.nodes):  # to nodes that nothing was known of yet
            number = len(self.edges)
            node = self.nodes[number]
            assert node is not None
            info = recv_info(node)
            if info is not None:
                self.received.append(info)
                self._follow(())
                continue
            if is_leaf(node):
                self.leaves.append(number)
            self._follow(node.next_functions)
        return source

    def _follow(self, edges: Iterable[tuple[Node | None, int]]) -> None:
        """Note where the outputs of the next node or source go, which may be nodes that get a number by it."""
        nodes, numbers = self.nodes, self.numbers
        found: list[Edge] = []
        children: list[int] = []
        for node, slot in edges:
            child = NO_NODE if node is None else numbers.get(node)
            if child is None:
                child = numbers[node] = len(nodes)  # type: ignore[index]  # NO_NODE is none of these
                nodes.append(node)
            found.append((child, slot))
            children.append(child)
        self.edges.append(found)
        self.children.append(children)
