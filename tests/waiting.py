"""Waiting for something that no event tells of."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 30.0
PAUSE_S = 0.005


def until(
    condition: Callable[[], Any], what: str, state: Callable[[], object] = lambda: "", within_s: float = PATIENCE_S
) -> None:
    """Wait until `condition`; otherwise fail, saying what never came true and what `state` tells then."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"never came true: {what} {state()}"
        time.sleep(PAUSE_S)
