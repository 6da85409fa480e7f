"""Threads: started with an error that says what to do, kept running, and waited for to the very end.

`Thread.join` returns when the thread's Python code is over. What C++ keeps for the thread is destroyed after that, and
torch's part of it takes the interpreter's lock: it holds Python objects where a backward pass, or whatever else user
functions do, put some into torch's thread-local state. If the interpreter is being finalized by then, the thread is
made to exit in the midst of a destructor, and the process aborts ("terminate called without an active exception").
One in six workers that had run a backward pass and then shut down did.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from zrpc.errors import LimitError
from zrpc.exception_text import log_error

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("zrpc")

RETRY_PAUSE_S = 0.1
"""How long a loop rests after an error, so that one that comes again and again takes no processor."""
GONE_WAIT_S = 1.0
"""How long at most the system is waited for; it takes well under a millisecond."""
_LOOK_EVERY_S = 0.0002


def start(target: Callable[[], object], name: str) -> threading.Thread:
    """A daemon thread that runs `target`.

    Raises:
        LimitError: the system gives no thread.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise LimitError(
            f"the thread {name} cannot be started ({error}): raise the limit of processes (ulimit -u, pids.max)"
        ) from error
    return thread


def keep_running(step: Callable[[], object], is_over: Callable[[], bool]) -> None:
    """Call `step` again and again until `is_over`. What it raises is logged and does not end this."""
    while not is_over():
        try:
            step()
        except BaseException as error:
            if is_over():
                return
            name = threading.current_thread().name
            log_error(log, "the thread %s goes on after an unexpected error", name, error=error)
            del error
            time.sleep(RETRY_PAUSE_S)


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
