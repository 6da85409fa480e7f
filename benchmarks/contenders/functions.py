"""What is called remotely."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def noop() -> None:
    """Nothing."""


def echo(x: torch.Tensor) -> torch.Tensor:
    """`x`."""
    return x


def sink(x: torch.Tensor) -> None:
    """Nothing, whatever `x` is."""
