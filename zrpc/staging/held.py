"""Memory of the host that devices still copy from: it is held until they have, and no longer.

It may be a slab that its sender waits for, so somebody must see to it soon: while anything is held, one task does.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from zrpc.staging.accelerator import Event

log = logging.getLogger("zrpc")


class Held:
    """Any thread may call it; the lock owns whether the task runs.

    Args:
        submit: runs a task on another thread, unless this worker is closed.
        waiting: entered while that thread waits for a device.
    """

    def __init__(
        self, submit: Callable[[Callable[[], None]], None], waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._submit = submit
        self._waiting = waiting
        self._lock = threading.Lock()
        self._held: deque[tuple[Event, object]] = deque()
        self._is_watched = False

    def __len__(self) -> int:
        return len(self._held)

    def until(self, event: Event, memory: object) -> None:
        """Hold `memory` until `event`."""
        with self._lock:
            self._held.append((event, memory))
            begins, self._is_watched = not self._is_watched, True
        if begins:
            self._submit(self._watch)

    def drain(self) -> None:
        """Wait for all that is held now, and let go of it."""
        for _ in range(len(self._held)):
            self._release_first()

    def _watch(self) -> None:
        while True:
            self._release_first()
            with self._lock:
                if not self._held:
                    self._is_watched = False
                    return

    def _release_first(self) -> None:
        """Let go of what was held first, once it may be."""
        try:
            event, memory = self._held.popleft()
        except IndexError:  # another thread drains
            return
        try:
            with self._waiting():
                event.synchronize()
        except RuntimeError as error:  # the device has failed: it copies nothing any more
            log.error("a copy to a device failed: %s", error)
        del event, memory
