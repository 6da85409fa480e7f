"""Where floors above ask whether values must be marked when they go from thread to thread (`zrpc.staging.streams`).

A process is one worker at most, and its values are handed on where no agent is at hand: so this is one variable of the
process. It is read without a lock, and costs those who use no device a look at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.staging.streams import Streams

streams: Streams | None = None
"""The streams of this process's worker; None: it uses no device, and nothing needs a mark."""


def order_by(of_worker: Streams | None) -> None:
    """From now on marks are of these streams; None: there are none."""
    global streams
    streams = of_worker
