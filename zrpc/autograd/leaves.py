"""Leaf tensors: how their gradients get into a context instead of into `.grad`.

The node of a leaf (`AccumulateGrad`) is run by torch's engine like any other, so hooks on the leaf and on its node are
called. A *tap*, a pre-hook on the node, takes the gradient away just before it would be added to `.grad`; torch runs
the node's other hooks all the same. The tap acts for runs of distributed passes only: local backward passes go by it
untouched, even at the same time.

One tap a node serves all passes of the process that reach the leaf, however many (parameters of a parameter server are
in many contexts at once). It is put on by the first and taken off by the last of them. Hooks must not be added to a
node that another thread is running, so everything that adds one is done by that first pass.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.autograd.functions import current_run

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.autograd.graph import Node

_lock = threading.Lock()
_taps: dict[Node, _Tap] = {}
"""The nodes with taps. Owned by the lock."""


class _Tap:
    """The tap of one node, and a view of what others hooked to the leaf and its node."""

    def __init__(self, node: Any) -> None:
        self.users = 0
        self._leaf: torch.Tensor = node.variable
        self._handle = node.register_prehook(partial(_take, self._leaf))
        self._pre_hooks = self._handle.hooks_dict_ref()
        probe = node.register_hook(_no_hook)
        self._post_hooks = probe.hooks_dict_ref()
        probe.remove()

    def others(self) -> bool:
        """Whether there is a hook of somebody else."""
        leaf: Any = self._leaf
        return bool(leaf._backward_hooks) or len(self._pre_hooks) > 1 or bool(self._post_hooks)

    def remove(self) -> None:
        """Take the tap off."""
        self._handle.remove()


class Taps:
    """The taps that one pass has opened. Not thread-safe.

    Args:
        is_left_alone: leaves that it is true of get none.
    """

    def __init__(self, is_left_alone: Callable[[torch.Tensor], bool]) -> None:
        self._is_left_alone = is_left_alone
        self._splittable: dict[Any, bool] = {}
        self._tapped: list[Any] = []

    def open(self, node: Any) -> bool:
        """Tap the node of a leaf, unless it is done.

        Returns:
            Whether it may run on parts of its gradient, and need not run at all, since nobody would see it.
        """
        splittable = self._splittable.get(node)
        if splittable is None:
            splittable = False
            if not self._is_left_alone(node.variable):
                self._tapped.append(node)
                splittable = not open_tap(node)
            self._splittable[node] = splittable
        return splittable

    def close(self) -> None:
        """Take them off. For when nothing of the pass runs any more."""
        tapped, self._tapped = self._tapped, []
        for node in tapped:
            close_tap(node)


def open_tap(node: Node) -> bool:
    """Put a tap on the node of a leaf, or count one more pass that needs it.

    Returns:
        Whether somebody hooked the leaf or its node, so that the node must run once, on the whole gradient. Hooks of
        C++ code, which Python cannot see, are not found.
    """
    with _lock:
        tap = _taps.get(node)
        if tap is None:
            tap = _taps[node] = _Tap(node)
        tap.users += 1
        return tap.others()


def close_tap(node: Node) -> None:
    """One pass less needs the tap of `node`."""
    with _lock:
        tap = _taps[node]
        tap.users -= 1
        if not tap.users:
            del _taps[node]
            tap.remove()


def _take(leaf: torch.Tensor, gradients: tuple[torch.Tensor | None, ...]) -> tuple[None] | None:
    run = current_run()
    gradient = gradients[0]
    if run is None or gradient is None:
        return None
    run.take(leaf, gradient)
    return (None,)


def _no_hook(*_: Any) -> None:
    """A hook that does nothing: to register one gives access to the hooks of a node."""
