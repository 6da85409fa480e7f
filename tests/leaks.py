"""What a test, or a worker process, leaves running or open: threads, child processes, sockets, memory that is shared.

zrpc shares memory in anonymous files (`memfd`), which are open, or only mapped; and it listens on abstract Unix
sockets, whose names are in /proc/net/unix alone.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import zmq

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTLE_S = 10.0
"""How long what was closed may take to be gone: threads end, and ZeroMQ closes sockets, some time after."""
PAUSE_S = 0.01

_FILES = Path("/proc/self/fd")
_MAPS = Path("/proc/self/maps")
_UNIX = Path("/proc/net/unix")
_TCP = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_INODE = 9
"""The column of a socket's inode in `_TCP`; its two ends are 1 and 2."""
_EVENTFD, _EVENTPOLL = "anon_inode:[eventfd]", "anon_inode:[eventpoll]"
_KINDS = ("socket:", _EVENTFD, _EVENTPOLL, "/memfd:")
"""Files that zrpc and ZeroMQ open: ZeroMQ's contexts and sockets wake each other by event descriptors."""
_HELPERS = ("from multiprocessing.forkserver import", "from multiprocessing.resource_tracker import")


class LeftError(AssertionError):
    """Something was left behind."""


def start_frame_collector() -> None:
    """Make pyzmq start the thread that holds the memory of frames under way: it lives as long as the process."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as receiver:
        sender.bind("inproc://first")
        receiver.connect("inproc://first")
        sent = sender.send(bytes(100_000), copy=False, track=True)
        receiver.recv()
        sent.wait()


@contextmanager
def nothing_left(settle_s: float = SETTLE_S, store_port: int | None = None) -> Iterator[None]:
    """What is there after the block and was not before, and does not go away in `settle_s`, is an error.

    Args:
        settle_s: how long that may take.
        store_port: the TCP port of a torch store that may be left: its sockets, and event descriptors, are not looked
            at.

    Raises:
        LeftError: it says what is left.
    """

    def look() -> set[str]:
        return _threads() | _processes() | _open_files(store_port) | _mapped_files()

    before = look()
    yield
    if not look() - before:
        return
    gc.collect()
    deadline = time.monotonic() + settle_s
    while (left := look() - before) and time.monotonic() < deadline:
        time.sleep(PAUSE_S)  # a thread's or descriptor's end sends no event
    if left:
        raise LeftError("left behind: " + "; ".join(sorted(_described(entry) for entry in left)))


def _threads() -> set[str]:
    return {f"thread {t.name} ({t.ident})" for t in threading.enumerate() if t.is_alive()}


def _processes() -> set[str]:
    """Child processes, without multiprocessing's own helpers, which live as long as the session."""
    me = psutil.Process()
    found = set()
    for child in me.children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            is_helper = child.ppid() == me.pid and any(helper in command for helper in _HELPERS)
            if not is_helper:
                found.add(f"process {child.pid} ({command[:200] or child.name()})")
        except psutil.NoSuchProcess:
            continue
    return found


def _open_files(store_port: int | None) -> set[str]:
    ignored = set() if store_port is None else {_EVENTFD, _EVENTPOLL, *_sockets_at(store_port)}
    found = set()
    for fd in _FILES.iterdir() if _FILES.exists() else ():
        try:
            target = os.readlink(fd)
        except OSError:  # the directory's own descriptor, or one closed meanwhile
            continue
        if target.startswith(_KINDS) and target not in ignored:
            found.add(f"file descriptor {fd.name} ({target})")
    return found


def _sockets_at(port: int) -> set[str]:
    """TCP sockets that listen at `port`, or at either end of a connection to it."""
    lines = [line.split() for table in _TCP if table.exists() for line in table.read_text().splitlines()[1:]]
    return {f"socket:[{line[_INODE]}]" for line in lines if any(line[end].endswith(f":{port:04X}") for end in (1, 2))}


def _mapped_files() -> set[str]:
    """Anonymous files in this process's memory, by their inodes: the same file may be mapped in several parts."""
    lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
    parts = [line.split(maxsplit=5) for line in lines if "/memfd:zrpc" in line]
    return {f"mapped memory {name} (inode {inode})" for *_, inode, name in parts}


def _described(entry: str) -> str:
    """With the name of a Unix socket that has one."""
    for line in _UNIX.read_text().splitlines()[1:] if "socket:" in entry else []:
        *_, inode, name = line.split(maxsplit=7)
        if f"socket:[{inode}]" in entry and not name.isdigit():
            return f"{entry} {name}"
    return entry
