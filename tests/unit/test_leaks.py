"""The check for what a test leaves behind: it sees each kind of thing that zrpc makes."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.leaks import LeftError, nothing_left
from zrpc.transport.mapping import map_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

SOON_S = 0.05


@contextmanager
def memory_file() -> Iterator[None]:
    fd = os.memfd_create("zrpc-slab")
    yield
    os.close(fd)


def make_mapping() -> memoryview:
    """Memory that is mapped as slabs are; its file is closed."""
    fd = os.memfd_create("zrpc-slab")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        return map_file(fd, mmap.PAGESIZE)
    finally:
        os.close(fd)


@contextmanager
def mapping_of_a_closed_file() -> Iterator[None]:
    mapped = make_mapping()
    yield
    del mapped


@contextmanager
def unix_socket() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0zrpc-left-{os.getpid()}-{listener.fileno()}")
        yield


@contextmanager
def zmq_context() -> Iterator[None]:
    with zmq.Context() as context, context.socket(zmq.PAIR):
        yield


@contextmanager
def thread() -> Iterator[None]:
    over = threading.Event()
    running = threading.Thread(target=over.wait, name="left running")
    running.start()
    yield
    over.set()
    running.join()


@contextmanager
def process() -> Iterator[None]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield
    child.communicate()


KINDS = {
    memory_file: r"file descriptor \d+ \(/memfd:zrpc-slab",
    mapping_of_a_closed_file: r"mapped memory /memfd:zrpc-slab",
    unix_socket: r"file descriptor \d+ \(socket:\[\d+\]\) @zrpc-left-",
    zmq_context: r"file descriptor \d+ \(anon_inode:\[event",
    thread: r"thread left running",
    process: r"process \d+ \(.*input\(\)",
}


@pytest.mark.parametrize(("make", "named"), KINDS.items(), ids=[make.__name__ for make in KINDS])
def test_what_is_left_is_named(make: Callable[[], AbstractContextManager[None]], named: str) -> None:
    with make():
        pass  # what the first use of it starts for good
    left = make()
    with pytest.raises(LeftError, match=named), nothing_left(SOON_S):
        left.__enter__()
    left.__exit__(None, None, None)


@pytest.mark.parametrize("make", KINDS, ids=[make.__name__ for make in KINDS])
def test_what_was_there_before_or_is_gone_is_not_named(make: Callable[[], AbstractContextManager[None]]) -> None:
    with make(), nothing_left(), make():
        pass


def test_what_goes_away_soon_afterwards_is_waited_for() -> None:
    """Threads end some time after what closed them has returned."""
    with nothing_left():
        end = threading.Event()
        threading.Thread(target=end.wait).start()
        threading.Timer(SOON_S, end.set).start()


def make_garbage() -> None:
    circle: list[object] = [make_mapping()]
    circle.append(circle)


def test_garbage_is_not_named() -> None:
    """A mapping that only a circle of references holds is collected first."""
    with nothing_left(SOON_S):
        make_garbage()
