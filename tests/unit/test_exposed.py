"""The registry of what other workers may call: which names lead to what, and which methods count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zrpc.errors import ConfigError
from zrpc.exposed import Registry, expose, registry
from zrpc.functions import async_execution


def function() -> None:
    """One of a module."""


class Base:
    def inherited(self) -> None: ...

    @expose
    def inherited_and_marked(self) -> None: ...


class Exposed(Base):
    constant = len

    def method(self) -> None: ...

    @async_execution
    def later(self) -> Any: ...

    @staticmethod
    def static() -> int:
        return 1

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    def _private(self) -> None: ...

    def __len__(self) -> int:
        return 0

    def __call__(self) -> None: ...

    @property
    def computed(self) -> Any:
        return print


class Derived(Exposed):
    def method(self) -> None: ...


def test_a_function_is_found_by_module_and_name_and_nothing_else_is() -> None:
    """An entry is found under its own name only."""
    mine = Registry()
    mine.add(function)
    assert mine.name_of(function) == (__name__, "function")
    assert mine.find(__name__, "function") is function
    assert mine.find(__name__, "Exposed") is None
    assert mine.find("os", "getpid") is None
    assert mine.name_of(test_a_function_is_found_by_module_and_name_and_nothing_else_is) is None


@pytest.mark.parametrize("name", [["a"], None, 1, b"function", ("a", "b")])
def test_what_is_no_name_finds_nothing(name: Any) -> None:
    """Names come from other workers and may be anything."""
    assert registry.find(name, name) is None


def test_what_has_no_hash_is_not_exposed() -> None:
    """The registry can be asked for anything."""
    assert registry.name_of([]) is None


def test_a_class_exposes_its_constructor_and_static_methods_by_name() -> None:
    """Methods of objects are not found by name: they are called on objects."""
    mine = Registry()
    mine.add(Exposed)
    assert mine.find(__name__, "Exposed") is Exposed
    assert mine.find(__name__, "Exposed.static") is Exposed.static
    assert mine.find(__name__, "Exposed.of_class")() == "Exposed"
    assert mine.name_of(Exposed.of_class) == (__name__, "Exposed.of_class")
    assert mine.find(__name__, "Exposed.method") is None


@pytest.mark.parametrize("name", ["method", "later", "static", "of_class", "__call__", "inherited_and_marked"])
def test_public_methods_of_an_exposed_class_may_be_called(name: str) -> None:
    """Its own, and inherited ones that are marked."""
    mine = Registry()
    mine.add(Exposed)
    assert mine.is_method(Exposed, name)


@pytest.mark.parametrize(
    "name", ["_private", "__len__", "__init__", "__reduce_ex__", "inherited", "computed", "constant", "absent", "", 1]
)
def test_other_attributes_of_an_exposed_class_may_not(name: Any) -> None:
    """Private and special ones, those of bases that are not exposed, and what is no method."""
    mine = Registry()
    mine.add(Exposed)
    assert not mine.is_method(Exposed, name)


def test_what_a_class_that_is_not_exposed_overrides_may_not_be_called() -> None:
    """The class that defines a method must be exposed, and not a base of it."""
    mine = Registry()
    mine.add(Exposed)
    assert not mine.is_method(Derived, "method")
    assert mine.is_method(Derived, "later")


def test_a_marked_method_is_not_found_by_name() -> None:
    """The mark on a method is for calls through RRefs alone."""
    assert registry.find(__name__, "Base.inherited_and_marked") is None
    assert registry.is_method(Base, "inherited_and_marked")
    assert not registry.is_method(Base, "inherited")


def test_operators_are_exposed_by_their_qualified_name() -> None:
    """Those of torch.library."""
    mine = Registry()
    mine.add(torch.ops.aten.add)
    assert mine.has_operator("aten::add")
    assert not mine.has_operator("aten::mul")


@pytest.mark.parametrize("target", [1, "name", None, object()])
def test_what_has_no_name_cannot_be_exposed(target: Any) -> None:
    """The error says what can be."""
    with pytest.raises(ConfigError, match="cannot be exposed"):
        expose(target)
