"""What the GPU tests share: maps of one device between two workers."""

from __future__ import annotations

DEVICE = "cuda:0"
BOTH = {name: {DEVICE: DEVICE} for name in ("worker0", "worker1")}
"""Each worker's `cuda:0` is the other's, and its own."""
TIMEOUT_S = 240.0
