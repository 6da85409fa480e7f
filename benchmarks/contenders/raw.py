"""Tensors as bytes, for frameworks that know of no tensors. Both sides know that they are flat and of what type."""

from __future__ import annotations

import warnings

import torch

# What arrives is read-only memory. A framework that must copy to get a tensor to write to would be slower still.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


def to_bytes(x: torch.Tensor) -> bytes:
    """The elements of `x`, copied."""
    return x.numpy().tobytes()


def to_tensor(raw: bytes, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """A flat tensor of `dtype` that shares memory with `raw`."""
    return torch.frombuffer(raw, dtype=dtype)
