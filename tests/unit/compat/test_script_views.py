"""What compiled code changes in a Python value is written back; what Python changes is seen by compiled code."""

# TorchScript reads annotations when it compiles: no `from __future__ import annotations` here.

import copy
from typing import Any

import pytest
import torch

from zrpc.compat.script_views import View, view_of


class Counter:
    """An object with attributes, as instances of TorchScript classes are in Python."""

    def __init__(self) -> None:
        self.n = 1
        self.parts = [1]


class Held:
    """Stands for a future that holds a TorchScript object: `inner` is what compiled code has of it."""

    def __init__(self, value: Any) -> None:
        self.inner = value

    def wait(self) -> Any:
        if isinstance(self.inner, Counter):
            made = Counter()
            made.n, made.parts = self.inner.n, list(self.inner.parts)
            return made
        return type(self.inner)(self.inner)


def hold(value: Any) -> Held:
    return Held(Held(value).wait())


class DeeplyHeld(Held):
    """The same, with parts of its own."""

    def wait(self) -> Any:
        return copy.deepcopy(self.inner)


def deep_hold(value: Any) -> Held:
    return DeeplyHeld(copy.deepcopy(value))


def test_changes_of_compiled_code_are_written_into_the_same_object() -> None:
    """Lists, dicts and objects are changed in place."""
    values: list[Any] = [[1], {"a": 1}, Counter()]
    views = [View(value, hold) for value in values]
    views[0].future().inner.append(2)
    views[1].future().inner["b"] = 2
    views[2].future().inner.n = 5
    for view in views:
        view.write_back()
    assert values[:2] == [[1, 2], {"a": 1, "b": 2}]
    assert values[2].n == 5


def test_parts_keep_their_identity() -> None:
    """A list within a list, a tuple or a dict is changed itself, where it is still at its place."""
    inner = [[1], [2], [3]]
    for value in ([inner[0]], (inner[1], 5), {"a": inner[2]}):
        view = View(value, deep_hold)
        changed = view.future().inner
        (changed["a"] if isinstance(changed, dict) else changed[0]).append(9)
        view.write_back()
    assert inner == [[1, 9], [2, 9], [3, 9]]


def test_one_object_has_one_view() -> None:
    """Two RRefs to one list share what compiled code has of it."""
    value = [1]
    first, second = view_of(value, hold), view_of(value, hold)
    assert first is second
    assert view_of([1], hold) is not first


def test_nothing_is_written_where_nothing_changed() -> None:
    """What Python changed meanwhile stays, and the next compiled code sees it."""
    value = [1]
    view = View(value, hold)
    first = view.future()
    value.append(2)
    view.write_back()
    assert value == [1, 2]
    assert view.future() is not first
    assert view.future().inner == [1, 2]


def test_one_object_is_shared_while_nothing_changes() -> None:
    """Compiled code that asks twice gets one object."""
    view = View([1], hold)
    assert view.future() is view.future()


@pytest.mark.parametrize("value", [[torch.ones(2)], {"a": torch.ones(2)}, [1.5, "a", None, (1, [2])]])
def test_tensors_are_told_apart_by_identity(value: Any) -> None:
    """Values with tensors can be compared: none of them counts as changed."""
    view = View(value, hold)
    before = view.future()
    view.write_back()
    assert view.future() is before
