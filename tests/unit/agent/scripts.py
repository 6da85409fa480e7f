"""TorchScript functions, which warn when they are compiled."""

# TorchScript reads annotations when it compiles: no `from __future__ import annotations` here.

import torch


@torch.jit.script
def numbers(first: int, second: int = 5) -> list[int]:
    return [first, second]


@torch.jit.script
def nothing() -> list[int]:
    made: list[int] = []
    return made


@torch.jit.script
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@torch.jit.script
def extend(held: torch.futures.Future[list[int]]) -> int:
    held.wait().append(9)
    return len(held.wait())
