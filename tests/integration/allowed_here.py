"""What workers of `test_allow` may call: listed as a module, or exposed one by one."""

from __future__ import annotations

import importlib
import os
from enum import Enum
from os import getpid
from pathlib import Path
from typing import Any

import torch

import zrpc as rpc

__all__ = ["getpid", "os"]


def same(value: Any) -> Any:
    """Gives back what it is given."""
    return value


def new_parameter() -> torch.nn.Parameter:
    """Two ones."""
    return torch.nn.Parameter(torch.ones(2))


def throw(error: Exception) -> None:
    """Raises it."""
    raise error


class ThingError(Exception):
    """One of this module's own."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.number = number

    def __str__(self) -> str:
        return f"it went wrong: {self.args}"


class Colour(Enum):
    """A few."""

    RED = 1


class Thing:
    """Something with a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def twice(self) -> int:
        """Its number twice."""
        return 2 * self.number

    def _private(self) -> int:
        return 1

    def __special__(self) -> int:
        return 1

    @property
    def attribute(self) -> Any:
        """Not a method."""
        return getpid

    def __reduce__(self) -> Any:
        return Thing, (self.number,)


def twice_of(thing: rpc.RRef[Thing]) -> int:
    """On another worker or the owner."""
    result: int = thing.rpc_sync().twice()
    return result


class _ReducedAs:
    def __init__(self, module: str, name: str, argument: str) -> None:
        self._reduced = getattr(importlib.import_module(module), name), (argument,)

    def __reduce__(self) -> Any:
        return self._reduced


def reduced_as(module: str, name: str, argument: str) -> Any:
    """A value that is unpickled by a call of that function."""
    return _ReducedAs(module, name, argument)


class _TouchingError(RuntimeError):
    def __init__(self, module: str, path: str) -> None:
        super().__init__("it went wrong")
        self._module, self._path = module, path

    def __reduce__(self) -> Any:
        return importlib.import_module(self._module).touch, (self._path,)


def raise_what_touches(module: str, path: str) -> None:
    """Raises an exception that is unpickled by a call."""
    raise _TouchingError(module, path)


# ---- exposed ---------------------------------------------------------------------------------------------------


@rpc.expose
def exposed_same(value: Any) -> Any:
    """Gives back what it is given."""
    return value


@rpc.expose
@rpc.functions.async_execution
def exposed_later(value: int) -> torch.futures.Future[int]:
    """Gives it back later."""
    future: torch.futures.Future[int] = torch.futures.Future()
    future.set_result(value)
    return future


@rpc.expose
def exposed_parameter() -> torch.nn.Parameter:
    """Two ones."""
    return torch.nn.Parameter(torch.ones(2))


@rpc.expose
def exposed_sum(weight: rpc.RRef[torch.Tensor], factor: torch.Tensor) -> torch.Tensor:
    """On the owner of the weight."""
    return weight.local_value() * factor


@rpc.expose
def exposed_throw(kind: str) -> None:
    """Raises an exception of some kind."""
    if kind == "builtin":
        raise KeyError("key")
    if kind == "own":
        raise ThingError("no", 3)
    if kind == "os":
        raise FileNotFoundError(2, "no", "file")
    if kind == "stop":
        raise StopIteration("over")
    raise ValueError(object())


class Base:
    """Not exposed."""

    def inherited(self) -> int:
        """Not exposed either."""
        return 1


@rpc.expose
class Counter(Base):
    """Counts."""

    def __init__(self, start: int) -> None:
        self.number = start

    def add(self, number: int) -> int:
        """The sum so far."""
        self.number += number
        return self.number

    @rpc.functions.async_execution
    def add_later(self, number: int) -> torch.futures.Future[int]:
        """The same by a future."""
        return exposed_later(self.add(number))

    @property
    def attribute(self) -> Any:
        """Not a method."""
        return self.add

    def __special__(self) -> int:
        return 1

    def share(self) -> rpc.RRef[int]:
        """A reference to the number."""
        return rpc.RRef(self.number)

    def _private(self) -> int:
        return 1

    @classmethod
    def made_of(cls) -> str:
        """The name of the class."""
        return cls.__name__


@rpc.expose
def exposed_value(rrefs: list[rpc.RRef[int]]) -> int:
    """The value of the first."""
    return rrefs[0].to_here()


@rpc.expose
def exposed_add(counters: dict[str, rpc.RRef[Counter]]) -> int:
    """Through the reference."""
    result: int = counters["counter"].rpc_sync().add(1)
    return result


@rpc.expose
class ExposedLinear(torch.nn.Linear):
    """A module that others may make and run."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)


def exposed_only_here(path: str) -> None:
    """Is exposed by worker0 alone."""
    Path(path).touch()
