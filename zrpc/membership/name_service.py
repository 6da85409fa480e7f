"""Torch's TCPStore where the name server does not answer.

What: the server of torch's store asks for the name of the address of each connection that it accepts, only to be able
to log it, and serves no client meanwhile. Where the name server does not answer, this takes 10 s, unless the resolver
is configured otherwise. Torch asks no more in a process once a question has failed for the moment (EAI_AGAIN,
pytorch#159007). So the name server is asked before a server is started. If there is no answer, one question of
torch's is made to fail at once: on a thread whose resolver may send none.

Threads: each thread has a resolver state of its own (`_res` of resolver(3)). It is changed on one thread, which then
ends. The rest of the process asks as before.

Failure: without glibc, or where torch asks in another way, nothing is changed, and the store is as slow as torch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

from zrpc import threads
from zrpc.transport.sockets import for_lookup

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("zrpc")

ANSWER_S = 0.5
"""A name server that takes longer counts as one that does not answer. One that does takes some milliseconds."""
FAIL_S = 2.0
"""For the question that fails: it takes some milliseconds."""
RETRY = 1
"""The index of `retry` in `struct __res_state`, which begins with `int retrans; int retry;`."""

_failed = threading.Event()
"""Torch asks no more questions in this process."""


def prepare(host: str) -> None:
    """Keep servers of torch's store in this process from waiting for a name server that does not answer.

    Args:
        host: where the store is to listen; the name of its address is asked for.

    Raises:
        LimitError: the system gives no thread.
    """
    if _failed.is_set() or _ends_within(ANSWER_S, lambda: _ask_for_name(host)):
        return
    if _ends_within(FAIL_S, _fail_once) and _failed.is_set():
        log.info("the name server gave no name of %s within %g s: torch's store logs addresses", host, ANSWER_S)


def _ask_for_name(host: str) -> None:
    """Ask as torch does: it connects from an IPv6 socket, to which an IPv4 address is a mapped one."""
    with contextlib.suppress(OSError):  # that there is no name is an answer, too
        family, _, _, _, address = socket.getaddrinfo(for_lookup(host), 0, type=socket.SOCK_STREAM)[0]
        if family == socket.AF_INET:
            address = (f"::ffff:{address[0]}", 0)
        socket.getnameinfo(address, socket.NI_NUMERICSERV)


def _fail_once() -> None:
    """Let torch ask for a name where no question is sent: a store's client does before it connects to its server."""
    import torch.distributed as dist

    with contextlib.suppress(AttributeError, RuntimeError):  # no glibc; no port
        libc = ctypes.CDLL(None)
        libc.__res_init()
        libc.__res_state.restype = ctypes.POINTER(ctypes.c_int)
        libc.__res_state()[RETRY] = 0
        limit = timedelta(seconds=FAIL_S)
        dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=limit, wait_for_workers=False)
        _failed.set()


def _ends_within(limit_s: float, step: Callable[[], None]) -> bool:
    """Run `step` on a thread of its own, which is left behind where it takes longer than `limit_s` seconds."""
    ended = threading.Event()

    def run() -> None:
        step()
        ended.set()

    threads.start(run, "zrpc-names")
    return ended.wait(limit_s)
