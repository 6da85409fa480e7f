"""Send functions that a pass need not plan for: nothing else in the pass leads to what they lead to.

That is the usual case on the worker where a pass begins: it sends parameters or inputs, leaves, and their gradients
come home last. Such a leaf gets its whole gradient at once, whenever that is, so neither the graph nor the scheduler
has to know of it; and what there is to find out about it can wait until gradients are on their way to somebody. And it
is the usual case where torch operators are called (`zrpc.autograd.operators`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.autograd.graph import is_leaf

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from torch.autograd.graph import Node

    from zrpc.autograd.functions import SendFunction
    from zrpc.ids import GlobalId, Incarnation


class LoneSends:
    """Those of `sends` that lead to leaves alone or to an operator, without those that `part_with` returned.

    Not thread-safe.

    Args:
        sends: by their ids.
        even_operators: whether operators are to be run by themselves.

    Raises:
        AutogradError: one is spent.
    """

    def __init__(self, sends: Mapping[GlobalId, SendFunction], *, even_operators: bool) -> None:
        self._sends: dict[GlobalId, SendFunction] = {}
        for message_id, send in sends.items():
            if send.operator is not None and even_operators:
                self._sends[message_id] = send
                continue
            for node, _ in send.edges:
                if not is_leaf(node):
                    break
            else:
                self._sends[message_id] = send

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._sends

    def __len__(self) -> int:
        return len(self._sends)

    def part_with(self, reached: Container[Node]) -> dict[GlobalId, SendFunction]:
        """Take out those with a leaf that is among `reached`, or that another of them leads to as well."""
        first: dict[Node, GlobalId] = {}
        parted: dict[GlobalId, None] = {}
        for message_id, send in self._sends.items():
            for node, _ in send.edges:
                other = first.setdefault(node, message_id)
                if node in reached or other != message_id:
                    parted |= {other: None, message_id: None}
        return {message_id: self._sends.pop(message_id) for message_id in parted}

    def nodes(self) -> list[Node]:
        """The nodes of the leaves for which gradients are still to come."""
        return [node for send in self._sends.values() for node, _ in send.edges if is_leaf(node)]

    def lives(self) -> set[Incarnation]:
        """The workers from which they are to come."""
        return {send.to for send in self._sends.values()}

    def take(self, message_id: GlobalId) -> SendFunction | None:
        """Gradients came for that send function, which is returned if it is one of these, for once."""
        return self._sends.pop(message_id, None)
