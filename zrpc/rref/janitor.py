"""Where garbage goes: what `__del__` saw, and values nobody uses any more.

`__del__` runs wherever the interpreter frees an object, inside a send or under any lock too. It therefore only puts a
note into a `SimpleQueue`, whose `put` may interrupt itself. Values are let go of here as well, because their own
`__del__` is user code, and what finds them unused is often the reading thread.

Between two rounds the janitor rests for `REST_S`, so that a program that drops an RRef after each call does not pay for
a change of threads each time.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("zrpc")

REST_S = 0.005


class Janitor:
    """One thread that takes notes, and drops garbage.

    Args:
        on_note: called with each note, on the janitor's thread.
    """

    def __init__(self, on_note: Callable[[Any], None]) -> None:
        self._on_note = on_note
        self._notes: SimpleQueue[Any] = SimpleQueue()
        self._closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="zrpc-janitor", daemon=True)
        self._thread.start()

    def note(self, note: object) -> None:
        """Have `note` seen to soon. May be called from anywhere, `__del__` and signal handlers included."""
        self._notes.put(note)

    def drop(self, garbage: list[Any]) -> None:
        """Let go of `garbage` on the janitor's thread. The caller must keep no reference to what is in it."""
        self._notes.put(garbage)

    def close(self) -> None:
        """See to the notes that are there, then end. Idempotent."""
        if not self._closed:
            self._closed = True
            self._notes.put(None)
            self._closing.set()
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _work(self) -> None:
        while (note := self._notes.get()) is not None:
            if isinstance(note, list):
                note.clear()
            else:
                try:
                    self._on_note(note)
                except Exception:
                    log.exception("an RRef that was dropped could not be given up")
            del note
            if self._notes.empty():
                self._closing.wait(REST_S)
