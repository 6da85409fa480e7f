"""Whether the next request is likely to be served so quickly that a reader should do it itself.

To hand a request to a handler thread costs about 40 µs here. So a reader serves requests itself as long as that is
quick; after one that was not, the next `SKIP_MIN` go to handler threads, then one is tried again. Each further one that
is slow doubles that number. Being wrong costs the messages behind it one period of `zrpc.transport.inbox.PARK_S`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK_S = 0.001
SKIP_MIN, SKIP_MAX = 32, 1024


class Quickness:
    """The experience of one worker. Owned by whoever reads; `timed` only changes what one thread at a time does."""

    def __init__(self) -> None:
        self._left_to_skip = 0
        self._next_skip = SKIP_MIN

    def expects_quick(self) -> bool:
        """Whether the reader should serve the next request itself."""
        if self._left_to_skip:
            self._left_to_skip -= 1
            return False
        return True

    def note(self, took_s: float) -> None:
        """A reader has served a request."""
        if took_s <= QUICK_S:
            self._next_skip = SKIP_MIN
        else:
            self._left_to_skip = self._next_skip
            self._next_skip = min(2 * self._next_skip, SKIP_MAX)

    def timed(self, work: Callable[[], None]) -> None:
        """Do `work`, and learn from it."""
        began = time.perf_counter()
        try:
            work()
        finally:
            self.note(time.perf_counter() - began)
