"""A module that is listed as allowed in `test_listed`, and what it has imported."""

import os
from enum import Enum
from functools import lru_cache, partial
from os import system
from typing import Any

import torch

__all__ = ["os", "partial", "system"]

TABLE = {"system": system}


def own(value: Any = None) -> Any:
    """Its own."""
    return value


class Own:
    """Its own."""

    kept = system

    def __init__(self) -> None:
        self.held = 5

    class Inner:
        """Within it."""

    def method(self) -> int:
        """A method."""
        return self.held

    @classmethod
    def of_class(cls) -> str:
        """One of the class."""
        return cls.__name__

    @lru_cache  # noqa: B019
    def cached(self) -> int:
        """A method that is kept."""
        return 1

    @property
    def computed(self) -> Any:
        """No method."""
        return self.method

    def _private(self) -> None: ...


class OwnError(Exception):
    """Its own."""


class Hue(Enum):
    """A few."""

    RED = 1


def to_compile(x: torch.Tensor) -> torch.Tensor:
    """TorchScript, once a test has compiled it."""
    return x + 1
