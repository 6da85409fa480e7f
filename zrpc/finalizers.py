"""What destructors leave to be done, and what threads that read or hold a lock have to log.

What: `__del__` and weakref callbacks run wherever the interpreter frees an object: within any statement of any thread,
under any lock. So they only append a task here (`defer`), and a control thread (`zrpc.control`) runs it soon. Handlers
of logs are code of users: so a thread that reads messages or holds a lock appends what it has to log, too.

Invariants: `defer` takes no lock and runs no other code, so it may interrupt itself. If one thread runs the tasks, they
run in the order in which they were deferred.

Threads: `defer` from anywhere; `run_pending` on whichever thread is to run them.

Failure: a task that raises is logged, and the next one runs. Without a control thread tasks wait for the next one, or
for the end of the process.
"""

from __future__ import annotations

import atexit
import logging
from collections import deque
from typing import TYPE_CHECKING

from zrpc.exception_text import log_error

if TYPE_CHECKING:
    from collections.abc import Callable

    Task = Callable[[], object]

log = logging.getLogger("zrpc")

_pending: deque[Task] = deque()
_wakers: tuple[Callable[[], None], ...] = ()


def defer(task: Task) -> None:
    """Have `task` run soon, on another thread."""
    _pending.append(task)
    for wake in _wakers:
        wake()


def run_pending() -> bool:
    """Run what was deferred; whether there was anything."""
    did_run = False
    while _pending:
        try:
            task = _pending.popleft()
        except IndexError:  # another thread was quicker
            break
        did_run = True
        try:
            task()
        except BaseException as error:
            log_error(log, "what was left to be done failed", error=error)
            del error
        del task
    return did_run


def wake_with(wake: Callable[[], None]) -> None:
    """From now on call `wake`, which must take no lock, when something is deferred."""
    global _wakers
    _wakers = (*_wakers, wake)


def do_not_wake(wake: Callable[[], None]) -> None:
    """Undo `wake_with`."""
    global _wakers
    _wakers = tuple(one for one in _wakers if one != wake)


atexit.register(run_pending)
