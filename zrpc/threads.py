"""The end of a thread, waited for to the very end.

`Thread.join` returns when the thread's Python code is over. What C++ keeps for the thread is destroyed after that, and
torch's part of it takes the interpreter's lock: it holds Python objects where a backward pass, or whatever else user
functions do, put some into torch's thread-local state. If the interpreter is being finalized by then, the thread is
made to exit in the midst of a destructor, and the process aborts ("terminate called without an active exception").
One in six workers that had run a backward pass and then shut down did.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading

GONE_WAIT_S = 1.0
"""How long at most the system is waited for; it takes well under a millisecond."""
_LOOK_EVERY_S = 0.0002


def join(thread: threading.Thread, timeout_s: float | None = None) -> bool:
    """Wait up to `timeout_s` until `thread` is over, and then until the system has no such thread any more.

    Returns:
        Whether it is over.
    """
    thread.join(timeout_s)
    if thread.is_alive():
        return False
    deadline = time.monotonic() + GONE_WAIT_S  # another thread may have got its number
    while _is_there(thread.native_id) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    return True


def _is_there(native_id: int | None) -> bool:
    """Whether this process has a thread of that number. Never, on systems without Linux's `/proc`."""
    return native_id is not None and os.path.exists(f"/proc/self/task/{native_id:d}")
