"""Unix sockets between the workers of one host and one user.

What: each worker listens at `DIRECTORY/zrpc-INCARNATION.sock`. A worker that finds that file can talk to it, so
containers that share the directory can, whatever else they do not share. The directory is `ZRPC_LOCAL_DIR`, else
`/tmp/zrpc-UID`, for this user alone.

Failure: a directory that cannot be used is an `OSError` that says why. Files of processes that were killed are removed
by the next worker that starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.ids import Incarnation

VARIABLE = "ZRPC_LOCAL_DIR"
PATH_MAX_NBYTES = 107
"""The kernel's: a longer path is not the address of a socket."""
PREFIX, SUFFIX = "zrpc-", ".sock"
SEND_BUFFER_NBYTES = 1 << 20
"""What the kernel holds for a receiver that is late to read, if it is allowed to; a message of 100 bytes takes 768."""
BACKLOG = 4096
STALE_S = 60.0
"""A file that is younger is left alone: its process may be about to listen."""
STALE_MAX_COUNT = 256
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def directory() -> Path:
    """Where workers of this host find each other's sockets.

    Raises:
        OSError: it cannot be made, or is another user's, or others may write to it.
    """
    given = os.environ.get(VARIABLE)
    path = Path(given).absolute() if given else _default()
    path.mkdir(mode=0o700, parents=bool(given), exist_ok=True)
    found = path.stat() if given else path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if found.st_uid != os.geteuid() or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        raise PermissionError(errno.EPERM, f"it is not this user's alone: set {VARIABLE} to one that is", str(path))
    return path


def describe() -> str:
    """Which directory that is, and what sets it: for messages."""
    given = os.environ.get(VARIABLE)
    return f"{given} ({VARIABLE})" if given else f"{_default()} (set {VARIABLE} to another directory)"


def path_in(where: Path, incarnation: Incarnation) -> str:
    """The address of the worker of that life.

    Raises:
        OSError: it is longer than an address may be.
    """
    path = str(where / f"{PREFIX}{incarnation.hex()}{SUFFIX}")
    if len(os.fsencode(path)) > PATH_MAX_NBYTES:
        raise OSError(
            errno.ENAMETOOLONG, f"it is longer than {PATH_MAX_NBYTES} bytes: set {VARIABLE} to a shorter one", path
        )
    return path


def listen(path: str) -> socket.socket:
    """A socket that listens at `path`. Files of sockets beside it that nothing listens at are removed.

    Raises:
        OSError: that cannot be.
    """
    _remove_stale(Path(path).parent)
    listener = _make_socket()
    try:
        listener.bind(path)
        try:
            os.chmod(path, 0o600)
            listener.listen(BACKLOG)
        except OSError:
            remove(path)
            raise
    except OSError:
        listener.close()
        raise
    return listener


def connect(path: str) -> socket.socket:
    """A connection to the worker that listens at `path`.

    Raises:
        OSError: none does, or it is another user's.
    """
    sock = _make_socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
        sock.connect(path)
        check_user(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def is_listening(incarnation: Incarnation) -> bool:
    """Whether the worker of that life listens on this host. Tried, not guessed."""
    if not hasattr(socket, "AF_UNIX"):
        return False
    try:
        path = path_in(directory(), incarnation)
        with _make_socket() as probe:
            return probe.connect_ex(path) in (0, errno.EAGAIN)
    except OSError:
        return False


def process_of(incarnation: Incarnation) -> int | None:
    """The process of the worker of that life, as the kernel knows it; None: it does not listen on this host."""
    try:
        with _make_socket() as probe:
            probe.connect(path_in(directory(), incarnation))
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return int(_CREDENTIALS.unpack(found)[0]) or None
    except OSError:
        return None


def remove(path: str) -> None:
    """Remove the file of a socket. Idempotent."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def check_user(sock: socket.socket) -> None:
    """See that the process at the other end is this user's, for sure. Each side sees the same of the other.

    Raises:
        PermissionError: it is not.
        OSError: it cannot be looked at.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if len(credentials) != _CREDENTIALS.size:
        raise PermissionError(errno.EPERM, "the system does not say whose process it is")
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if not uid == os.geteuid() != _overflow_uid():
        raise PermissionError(errno.EPERM, f"it is a process of user {uid}")


def _default() -> Path:
    return Path(f"/tmp/zrpc-{os.geteuid()}")  # whose it is, is looked at


def _make_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _remove_stale(where: Path) -> None:
    oldest = time.time() - STALE_S
    with contextlib.suppress(OSError), os.scandir(where) as entries:
        for count, entry in enumerate(entries):
            if count >= STALE_MAX_COUNT:
                break
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        _remove_if_stale(entry.path)


def _remove_if_stale(path: str) -> None:
    with _make_socket() as probe:
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            remove(path)


@cache
def _overflow_uid() -> int:
    """The user that all those look like who are not known in this container.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        with open("/proc/sys/kernel/overflowuid") as file:
            return int(file.read())
    except FileNotFoundError:  # this is Linux's own number where nobody has set another
        return 65_534
