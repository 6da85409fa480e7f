"""The grad mode of a caller, which holds for its calls.

What: whether `torch.no_grad` or `torch.inference_mode` is on where a call is made, as a number that travels, and the
context in which the call is then served. Threads: torch keeps the mode for each thread.
"""

from __future__ import annotations

import reprlib
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import ProtocolError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class GradMode(IntEnum):
    """The numbers that travel."""

    ENABLED = 0
    NO_GRAD = 1
    INFERENCE = 2


def current() -> GradMode:
    """The mode of this thread."""
    if torch.is_grad_enabled():
        return GradMode.ENABLED
    return GradMode.INFERENCE if torch.is_inference_mode_enabled() else GradMode.NO_GRAD


def received(number: Any) -> GradMode:
    """The mode of that number.

    Raises:
        ProtocolError: there is none.
    """
    try:
        return GradMode(number)
    except ValueError as error:
        raise ProtocolError(
            f"a call came with the grad mode {reprlib.repr(number)}, which this version does not know"
        ) from error


class Entered:
    """A context in which `mode` is on and, within it, `inner` is entered."""

    __slots__ = ("_inner", "_mode")

    def __init__(self, mode: GradMode, inner: AbstractContextManager[None]) -> None:
        self._mode: Any = torch.inference_mode() if mode is GradMode.INFERENCE else torch.no_grad()
        self._inner = inner

    def __enter__(self) -> None:
        self._mode.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._mode.__exit__(*error)
