"""Open files: asked for before they are needed, and an error that says what to do where there are no more."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import zmq

from zrpc.errors import LimitError
from zrpc.transport import descriptors, sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def set_limit() -> Iterator[Callable[[int], None]]:
    """Sets how many more files than now this process may open, until the test is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda more: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors.count_open() + more, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_room_is_asked_for_and_given_back(set_limit: Callable[[int], None]) -> None:
    set_limit(40)
    before = descriptors.count_open()
    for _ in range(3):
        descriptors.check_room(20)
    assert descriptors.count_open() == before
    with pytest.raises(LimitError, match=r"may not open 108 more files .* of at most \d+ are open.* `ulimit -n`"):
        descriptors.check_room(100)
    assert descriptors.count_open() == before


def test_to_ask_for_room_takes_no_files_from_other_threads(set_limit: Callable[[int], None]) -> None:
    """One thread asks for room all the time while another opens the last files that there are: it gets them."""
    set_limit(descriptors.SPARE + 4)
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            with contextlib.suppress(LimitError):
                descriptors.check_room(2)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            for _ in range(500):
                for fd in [os.dup(0) for _ in range(descriptors.SPARE)]:
                    os.close(fd)
        finally:
            is_over.set()
        asking.result()


def test_files_above_a_limit_that_was_lowered_take_no_room_below_it() -> None:
    """What counts is whether there are free numbers below the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = descriptors.count_open()
    assert opened is not None
    limit = opened + 40
    high = [fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, limit + 10) for _ in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        descriptors.check_room(2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in high:
            os.close(fd)


def test_room_is_made_by_raising_the_soft_limit(set_limit: Callable[[int], None]) -> None:
    set_limit(20)
    with pytest.raises(LimitError):
        descriptors.check_room(100)
    assert descriptors.make_room(100)
    descriptors.check_room(100)
    raised = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert descriptors.make_room(10)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == raised, "a limit that is enough is left alone"


def test_the_hard_limit_is_respected(set_limit: Callable[[int], None]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no hard limit")
    set_limit(20)
    assert not descriptors.make_room(hard + 1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard, "as many as there may be"


def test_scarce(set_limit: Callable[[int], None]) -> None:
    set_limit(descriptors.PER_ENDPOINT + 10)
    assert not descriptors.is_scarce()
    set_limit(descriptors.PER_ENDPOINT - 10)
    assert descriptors.is_scarce()


def test_plenty(set_limit: Callable[[int], None]) -> None:
    set_limit(descriptors.count_open() + 10)
    assert descriptors.are_plenty()
    set_limit(descriptors.count_open() - 10)
    assert not descriptors.are_plenty(), "more than half are open"


def test_a_socket_that_would_not_get_its_files_is_not_made(set_limit: Callable[[int], None]) -> None:
    with sockets.make_context() as context, sockets.make_socket(context, zmq.DEALER) as sock:
        set_limit(descriptors.PER_PEER)
        with pytest.raises(LimitError):
            sockets.make_socket(context, zmq.DEALER)
        assert sock.getsockopt(zmq.LINGER) == 0
    with pytest.raises(LimitError):
        sockets.make_context()


@pytest.fixture
def no_more_files(set_limit: Callable[[int], None]) -> Iterator[None]:
    """This process has as many files open as it may."""
    set_limit(20)
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.dup(0))
    yield
    for fd in held:
        os.close(fd)


@pytest.mark.usefixtures("no_more_files")
def test_at_the_limit_files_are_scarce_and_counted_as_many_as_there_may_be() -> None:
    """The files cannot be listed then, which is not taken for none. Those above a lowered limit are counted too."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    opened = descriptors.count_open()
    assert opened is not None
    assert opened >= allowed
    assert descriptors.is_scarce()
    assert not descriptors.are_plenty()
    assert descriptors.describe() == f"{opened} of at most {allowed} are open"
    with pytest.raises(LimitError):
        descriptors.check_room(1)
    assert descriptors.make_room(30)
    descriptors.check_room(22)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENFILE, errno.ENOENT])
def test_a_count_that_cannot_be_found_out_is_none(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """It is said in words, whether files are scarce is tried, and there are none to spare."""

    def refuse(path: str) -> list[str]:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "stat", refuse)
    assert descriptors.count_open() is None
    assert descriptors.describe().startswith("it is not known how many")
    assert not descriptors.is_scarce()
    assert not descriptors.are_plenty()
    assert descriptors.make_room(8)
