"""What every test is held to: it leaves no thread, child process, socket or shared memory behind."""

from __future__ import annotations

import multiprocessing.forkserver
import multiprocessing.resource_tracker
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTLE_S = 5.0
"""How long what a test closed may take to be gone: threads end, and ZeroMQ closes sockets, some time after."""

_SHM = Path("/dev/shm")
_FDS = Path("/proc/self/fd")


def _threads() -> set[str]:
    return {f"thread {t.name} ({t.ident})" for t in threading.enumerate()}


def _processes() -> set[str]:
    """Child processes, without multiprocessing's own helpers, which live as long as the session."""
    helpers = {
        multiprocessing.forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
        multiprocessing.resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
    }
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            if child.pid not in helpers:
                found.add(f"process {child.pid} ({' '.join(child.cmdline())[:200] or child.name()})")
        except psutil.NoSuchProcess:
            continue
    return found


def _sockets() -> set[str]:
    """Sockets, and the event descriptors by which ZeroMQ's contexts and sockets wake each other."""
    found = set()
    for fd in _FDS.iterdir() if _FDS.exists() else ():
        try:
            target = str(fd.readlink())
        except OSError:  # the directory's own descriptor, or one closed meanwhile
            continue
        if target.startswith(("socket:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]")):
            found.add(f"file descriptor {fd.name} ({target})")
    return found


def _shared_memory() -> set[str]:
    """zrpc's files in /dev/shm that no process of somebody else holds: several sessions may run on one machine."""
    names = {str(path) for path in _SHM.glob("zrpc*")} if _SHM.exists() else set()
    return {f"shared memory {name}" for name in names}


def _mapped_by_others() -> set[str]:
    me = psutil.Process()
    ours = {me.pid, *(child.pid for child in me.children(recursive=True))}
    mapped = set()
    for process in psutil.process_iter():
        if process.pid in ours:
            continue
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        mapped |= {f"shared memory {line.split()[-1]}" for line in maps.splitlines() if str(_SHM / "zrpc") in line}
    return mapped


def _settled(look: Callable[[], set[str]], before: set[str]) -> set[str]:
    """What `look` still sees beside `before` once it had `SETTLE_S` to go away."""
    deadline = time.monotonic() + SETTLE_S
    while (left := look() - before) and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread's or descriptor's end sends no event
    return left


@pytest.fixture(scope="session", autouse=True)
def _frame_collector() -> None:
    """Make pyzmq start the thread that holds the memory of frames under way: it lives as long as the process."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as receiver:
        sender.bind("inproc://first")
        receiver.connect("inproc://first")
        sent = sender.send(bytes(100_000), copy=False, track=True)
        receiver.recv()
        sent.wait()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves something running or open."""
    looks = (_threads, _processes, _sockets, _shared_memory)
    before = [look() for look in looks]
    yield
    left: set[str] = set()
    for look, known in zip(looks, before, strict=True):
        left |= _settled(look, known)
    if left and any(entry.startswith("shared memory") for entry in left):
        left -= _mapped_by_others()
    if left:
        pytest.fail("left behind by this test: " + "; ".join(sorted(left)), pytrace=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
