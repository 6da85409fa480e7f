"""What compiled code changes in a Python value is written back; what Python changes is seen by compiled code."""

# TorchScript reads annotations when it compiles: no `from __future__ import annotations` here.

from typing import Any

import pytest
import torch

from zrpc.compat.script_views import View


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
