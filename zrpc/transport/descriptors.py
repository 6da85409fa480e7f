"""How many files this process may have open. Sockets are files, and each of ZeroMQ's takes several.

Where no file can be opened any more, ZeroMQ's own threads go on trying in silence: a connection is never made, and
calls wait until their time is over. So it is asked before a socket is made whether it will get all that it needs.
"""

from __future__ import annotations

import math
import os

from zrpc.errors import LimitError

try:
    import resource
except ImportError:  # not a POSIX system: there is no such limit
    resource = None  # type: ignore[assignment]

PER_PEER = 7
"""Outbound socket, what wakes it, the two ends of its monitor, a shortcut, and the peer's two. [measured]"""
PER_ENDPOINT = 24
"""What an endpoint has open before it knows anybody, at most. [measured: 19]"""
SPARE = 8
"""Left to the rest of the process by whoever asks whether there is room."""


def check_room(count: int) -> None:
    """See whether `count` more files can be opened, and `SPARE` beside them, by opening as many for a moment.

    Raises:
        LimitError: they cannot.
    """
    held: list[int] = []
    try:
        while len(held) < count + SPARE:
            held.extend(os.pipe())
    except OSError as error:
        raise LimitError(
            f"no socket can be made, as this process may not open {count + SPARE} more files ({error.strerror}; "
            f"{describe()}). A worker needs {PER_PEER} files for each worker that it talks to: raise the limit with "
            "`ulimit -n`, or use a broker, with which it needs none"
        ) from error
    finally:
        for fd in held:
            os.close(fd)


def make_room(count: int) -> bool:
    """See to it that `count` more files can be opened, by raising the soft limit if need be; false: not allowed to."""
    if resource is None:
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count_open() + count + SPARE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return True
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # some systems have a lower limit than they admit to
        return False
    return allowed == wanted


def is_scarce() -> bool:
    """Whether few more files can be opened."""
    return count_open() + PER_ENDPOINT > _allowed()


def are_plenty() -> bool:
    """Whether this process has at most half of the files open that it may: more is for what it cannot do without."""
    return count_open() * 2 <= _allowed()


def count_open() -> int:
    """How many files this process has open; 0 where the system does not say."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


def describe() -> str:
    """How many files are open, of how many: for messages."""
    if resource is None:
        return "no limit is known"
    return f"{count_open()} of at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are open"


def _allowed() -> float:
    if resource is None:
        return math.inf
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft
