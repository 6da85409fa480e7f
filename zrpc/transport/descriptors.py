"""How many files this process may have open. Sockets are files, and each of ZeroMQ's takes several.

Where no file can be opened any more, ZeroMQ's own threads go on trying in silence: a connection is never made, and
calls wait until their time is over. So it is asked before a socket is made whether it will get all that it needs.
"""

from __future__ import annotations

import errno
import math
import os

from zrpc.errors import LimitError

try:
    import resource
except ImportError:  # not a POSIX system: there is no such limit
    resource = None  # type: ignore[assignment]

PER_PEER = 7
"""Outbound socket, what wakes it, the two ends of its monitor, and the peer's. [measured]"""
PER_ENDPOINT = 24
"""What an endpoint has open before it knows anybody, at most. [measured: 19]"""
SPARE = 8
"""Left to the rest of the process by whoever asks whether there is room."""
_LISTING = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def check_room(count: int) -> None:
    """See whether `count` more files can be opened, and `SPARE` beside them.

    None is opened to find that out, which might be the last one that another thread can have, unless the system does
    not say how many are open.

    Raises:
        LimitError: they cannot.
    """
    opened, allowed = count_open(), _allowed()
    if opened is not None and opened + count + SPARE > allowed:
        opened = _count_numbers_below(allowed)  # a limit that was lowered counts what is below it
    if (opened is None and not _can_open(count + SPARE)) or (opened or 0) + count + SPARE > allowed:
        raise LimitError(
            f"no socket can be made, as this process may not open {count + SPARE} more files ({describe()}). A worker "
            f"needs {PER_PEER} files for each worker that it talks to: raise the limit with `ulimit -n`, or use a "
            "broker, with which it needs none"
        )


def _count_numbers_below(limit: float) -> int | None:
    """How many open files have numbers below `limit`; None where that cannot be found out."""
    try:
        return sum(int(number) < limit for number in os.listdir(_LISTING))
    except OSError as error:
        return int(limit) if error.errno == errno.EMFILE else None


def _open_for_a_moment(count: int) -> None:
    """Open `count` files and close them; raises OSError if that cannot be."""
    held: list[int] = []
    try:
        while len(held) < count:
            held.extend(os.pipe())
    finally:
        for fd in held:
            os.close(fd)


def _can_open(count: int) -> bool:
    try:
        _open_for_a_moment(count)
    except OSError:
        return False
    return True


def make_room(count: int) -> bool:
    """See to it that `count` more files can be opened, by raising the soft limit if need be; false: not allowed to."""
    if resource is None:
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = count_open()
    wanted = (soft if opened is None else opened) + count + SPARE  # not known: no more than are allowed
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return True
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # some systems have a lower limit than they admit to
        allowed = soft
    return allowed == wanted or (opened is None and _can_open(count + SPARE))


def is_scarce() -> bool:
    """Whether few more files can be opened. Where it is not known how many are open, it is tried."""
    opened = count_open()
    if opened is not None:
        return opened + PER_ENDPOINT > _allowed()
    return not _can_open(PER_ENDPOINT)


def are_plenty() -> bool:
    """Whether this process has at most half of the files open that it may: more is for what it cannot do without.

    False where that is not known.
    """
    allowed = _allowed()
    if allowed == math.inf:
        return True
    opened = count_open()
    return opened is not None and opened * 2 <= allowed


def count_open() -> int | None:
    """How many files this process has open; None where that cannot be found out.

    Since Linux 6.2 the size of `/proc/self/fd` says it. To list them takes a file more. Where this process may not open
    that, it has as many as it may.
    """
    try:
        return os.stat(_LISTING).st_size or len(os.listdir(_LISTING))
    except OSError as error:
        return int(_allowed()) if error.errno == errno.EMFILE and _allowed() != math.inf else None


def describe() -> str:
    """How many files are open, of how many: for messages."""
    if resource is None:
        return "no limit is known"
    most, opened = _allowed(), count_open()
    number = "it is not known how many" if opened is None else str(opened)
    return f"{number} are open, without a limit" if most == math.inf else f"{number} of at most {most:.0f} are open"


def _allowed() -> float:
    if resource is None:
        return math.inf
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft
