"""Another process of this host: whether it has ended. Exactly: its number may be another's by then."""

from __future__ import annotations

import os
import select
import weakref


class Process:
    """Any thread may use it. It holds an open file as long as anybody holds it.

    Args:
        pid: its number.

    Raises:
        OSError: there is no such process, or this system cannot tell when one ends.
    """

    def __init__(self, pid: int) -> None:
        if not hasattr(os, "pidfd_open"):
            raise OSError("this system does not tell when a process ends")
        self._fd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._fd)

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Whether it has ended, or does so within that time."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(within_s * 1000))
