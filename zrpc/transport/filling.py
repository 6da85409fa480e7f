"""Slabs whose descriptors travel ahead of what is in them.

To copy 1 MiB into a slab takes as long as a message takes to its receiver. So unless a buffer is large, the message
that names it goes first, and the copy is made while it travels; the slab's header says when it is whole. The receiver
takes the message in as any other, and looks at the header when somebody wants what came: not on the thread that reads,
because the sender may have been stopped in between, and then it has to wait.

Measured on one host, calls that send a buffer of that size, without and with this (least of 12 processes each): 64 KiB
138 -> 115 µs, 256 KiB 139 -> 118, 1 MiB 156 -> 127, 4 MiB 260 -> 213, 8 MiB 449 -> 377.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from zrpc import interrupts
from zrpc.errors import AgentClosedError, PeerLostError, ProtocolError
from zrpc.transport.copying import SPLIT_MIN_NBYTES
from zrpc.transport.polling import let_others_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.transport.slab import Slab, SlabMemory
    from zrpc.wire.envelope import Buffer
    from zrpc.wire.region import Region

MAX_NBYTES = SPLIT_MIN_NBYTES - 1
"""Larger buffers are filled in first: two threads copy those, and the receiver, which polls, is in the way of one."""
POLL_S = 0.002
SLEEP_S = 0.001


Unfilled = list["SlabMemory"]
"""Slabs that are not whole yet."""


class Fill(NamedTuple):
    """What the sender has to do once the message has left: to copy `buffer` into `slab`."""

    slab: Slab
    buffer: Buffer | Region


class Filling:
    """The slabs of one message that were not whole when it came.

    Args:
        slabs: these.
        is_over: whether this worker shuts down.
    """

    def __init__(self, slabs: Unfilled, is_over: Callable[[], bool]) -> None:
        self._slabs = slabs
        self._is_over = is_over

    def wait(self, deadline: float | None) -> bool:
        """See `Pending.wait`."""
        for memory in self._slabs:
            began = time.monotonic()
            while memory.is_filling:
                interrupts.check()
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return False
                if now - began < POLL_S:
                    let_others_run()
                else:
                    self._look(memory)
                    time.sleep(SLEEP_S)
            if memory.is_torn:
                raise ProtocolError("the sender was interrupted as it wrote what it sent into shared memory")
        for _ in range(2):
            with _fence:
                pass
        return True

    def _look(self, memory: SlabMemory) -> None:
        """Raise if nothing is to be waited for any more."""
        if self._is_over():
            raise AgentClosedError("this worker shut down before its peer had written what it sent into shared memory")
        if (memory.is_left or memory.is_retired()) and memory.is_filling:
            raise PeerLostError("the sender is lost, or gave up, before it had written what it sent")


_fence = threading.Lock()
"""Taken, given back and taken again after the last look at a header: so that on no processor anything is read that was
in the slab before. `SlabPool.fill` takes a lock between its copy and the header."""
