"""TorchScript functions, which warn when they are compiled: import this in worker processes only."""

# TorchScript reads annotations when it compiles: no `from __future__ import annotations` here.

import torch
from torch.distributed.rpc import RRef


@torch.jit.script
def plus(x: torch.Tensor, n: int) -> torch.Tensor:
    return x + n


@torch.jit.script
def failing(x: torch.Tensor) -> torch.Tensor:
    if x.numel() > 0:
        raise ValueError("Expected error")
    return x


@torch.jit.script
def value_plus(ref: RRef[torch.Tensor], n: int) -> torch.Tensor:
    return ref.to_here() + n


@torch.jit.script
def owner_of(ref: RRef[dict[str, int]]) -> tuple[str, bool, bool, int]:
    return ref.owner_name(), ref.is_owner(), ref.confirmed_by_owner(), ref.local_value()["a"]
