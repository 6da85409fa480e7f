"""A TorchScript compilation that stops in its middle until it is let go on."""

from __future__ import annotations

import threading
import types
from typing import Any

import torch


class SlowLookup(types.ModuleType):
    """A module whose `relu` the compiler asks for, and gets once `answer` is set.

    Attributes:
        asked: set when the compiler has asked.
        answer: what the compiler waits for.
    """

    def __init__(self) -> None:
        super().__init__("slow_lookup")
        self.asked = threading.Event()
        self.answer = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name != "relu":
            raise AttributeError(name)
        self.asked.set()
        self.answer.wait()
        return torch.relu
