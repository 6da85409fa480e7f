"""How much memory slabs may take: all those of a worker together, and of what the system has left.

Too much would not be refused: a process in a full cgroup is killed while it allocates [measured: version 1,
`posix_fallocate` of a memfd, SIGKILL]. So it is asked first, once for many slabs.
"""

from __future__ import annotations

import resource
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zrpc.transport.headroom import available_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POOL_MAX_NBYTES = 2 << 30
"""What one worker's slabs may take together; beyond it, buffers travel through sockets."""
POOL_MAX_SHARE = 0.25
"""Nor may they take more than this part of the memory that is available when the worker starts."""
POOL_MAX_COUNT = 4096
"""How many slabs one worker may have: receivers map each, and a process may have 65,530 mappings."""
FILES_MAX_SHARE = 0.25
"""Nor may they be more than this part of the files that the process may have open: each slab is one."""
RESERVE_NBYTES = 64 << 20
"""What fresh slabs leave of the memory that is available, whatever happens."""
GROWTH_MAX_SHARE = 0.5
"""Nor may a fresh slab take more than this part of the rest."""
ALLOWANCE_NBYTES = 64 << 20
"""How much is taken, at most, before it is asked again what is available."""
REFUSALS = 64
"""So many more slabs are refused, once there was not enough memory, before it is asked again."""


def limits() -> tuple[int, int]:
    """What the slabs of a worker that starts now may take together, in bytes, and how many there may be.

    Raises:
        OSError: it cannot be found out how much memory there is.
    """
    available = available_nbytes()
    nbytes = POOL_MAX_NBYTES if available is None else min(POOL_MAX_NBYTES, int(available * POOL_MAX_SHARE))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = POOL_MAX_COUNT if files == resource.RLIM_INFINITY else min(POOL_MAX_COUNT, int(files * FILES_MAX_SHARE))
    return nbytes, count


class Allowance:
    """What may be taken before it is asked again. Any thread may call it: senders do, and no thread that reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self._making_nbytes = 0
        self._asks_to_skip = 0

    @contextmanager
    def taking(self, nbytes: int, warn: Callable[[str], None]) -> Iterator[bool]:
        """In the body so much memory is taken, if it may be; `warn` is told why not, where that was found out now.

        Yields:
            Whether it may.
        """
        with self._lock:
            refusal = self._ask(nbytes) if nbytes > self._left else None
            is_allowed = nbytes <= self._left
            if is_allowed:
                self._left -= nbytes
                self._making_nbytes += nbytes
        if refusal is not None:
            warn(refusal)
        try:
            yield is_allowed
        finally:
            if is_allowed:
                with self._lock:
                    self._making_nbytes -= nbytes

    def _ask(self, nbytes: int) -> str | None:
        """Find out how much may be taken from now on; why not `nbytes`, if that was asked. Call it under the lock."""
        self._left = 0
        if self._asks_to_skip:
            self._asks_to_skip -= 1
            return None
        try:
            available = available_nbytes()
        except OSError as error:  # then nothing is taken
            self._asks_to_skip = REFUSALS
            return f"it cannot be found out how much memory is available ({error})"
        if available is None:  # a system that never says: the pool's own limit has to do
            self._left = max(nbytes, ALLOWANCE_NBYTES)
            return None
        most = int((available - self._making_nbytes - RESERVE_NBYTES) * GROWTH_MAX_SHARE)
        if nbytes > most:
            self._asks_to_skip = REFUSALS
            return f"a slab of {nbytes} bytes is too much where {available} bytes are available"
        self._left = min(most, max(nbytes, ALLOWANCE_NBYTES))
        return None
