"""What came and could not be read: counted, and logged now and then.

What: a peer that sends what is no message may do so a million times. Each time is counted, by kind, for
`agent.get_debug_info()`. Of each kind the first few are logged, and then one each `INTERVAL_S` seconds, with how many
were left out since.

Invariants: kinds are named in zrpc's own code, so there are few. Threads: any; the lock owns the counts, and nothing is
logged under it, nor by the thread that reads (`zrpc.finalizers`). Failure: none.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from zrpc import finalizers, remote_text
from zrpc.exception_text import text_of

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("zrpc")

BURST = 5
"""So many of a kind are logged at once."""
INTERVAL_S = 10.0


class Tally:
    """Counts of one process.

    Args:
        clock: the time in seconds.
        defer: runs what logs.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic,
        defer: Callable[[Callable[[], object]], None] = finalizers.defer,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._defer = defer
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._left_out: dict[str, int] = {}
        self._next_at: dict[str, float] = {}

    def counts(self) -> dict[str, int]:
        """How many of each kind there were so far."""
        with self._lock:
            return dict(self._counts)

    def note(self, kind: str, source: str, error: BaseException | str, *, at_once: bool = False) -> None:
        """`source` sent what cannot be read.

        Args:
            kind: one of a few words.
            source: who, for people.
            error: why it cannot be read; it may hold words of `source`.
            at_once: log it on this thread, which may: the broker's.
        """
        with self._lock:
            count = self._counts[kind] = self._counts.get(kind, 0) + 1
            now = self._clock()
            if count > BURST and now < self._next_at[kind]:
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return
            self._next_at[kind] = now + INTERVAL_S
            left_out = self._left_out.pop(kind, 0)
        text = remote_text.line(error if isinstance(error, str) else text_of(error))
        write = partial(_log, kind, remote_text.line(source), text, left_out)
        if at_once:
            write()
        else:
            self._defer(write)


def _log(kind: str, source: str, text: str, left_out: int) -> None:
    since = f" (and {left_out} more of this kind since the last line)" if left_out else ""
    log.error("a %s of %s could not be read: %s%s", kind, source, text, since)


received = Tally()
"""Of this process."""
