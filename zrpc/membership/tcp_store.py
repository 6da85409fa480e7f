"""Opening a torch TCPStore so that a signal is acted on meanwhile.

TCPStore's constructor waits in C++, where Python's signal handlers do not run: for its host to listen, for its answer
(without heeding its time limit) and, on the host, for all workers to connect. So the host is waited for here, in
Python: a connection that is refused costs it nothing but its kernel's answer. The constructor then has little to do,
and no workers to wait for. It runs on a thread of its own, which is left behind where what listens never answers.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from queue import Empty, Queue
from typing import TYPE_CHECKING

from zrpc import threads

if TYPE_CHECKING:
    import torch.distributed as dist

CONNECT_S = 1.0
"""How long a connection is tried before it is tried anew."""
RETRY_MIN_S = 0.02
RETRY_MAX_S = 0.5


class ListenError(RuntimeError):
    """The store cannot be opened here: its port is taken, say."""


def open_tcp_store(host: str, port: int, *, is_host: bool, timeout_s: float, use_libuv: bool = True) -> dist.Store:
    """The store at `host` and `port`; with `is_host` this process opens it there.

    Raises:
        ListenError: this process is the host and cannot listen there. It is not tried again.
        RuntimeError: the store does not answer within `timeout_s` seconds; the text is the system's, or torch's.
        LimitError: the system gives no thread.
    """
    import torch.distributed as dist

    deadline = time.monotonic() + timeout_s
    if not is_host:
        _await_listener(host, port, deadline)
    left_s = max(RETRY_MAX_S, deadline - time.monotonic())
    outcome: Queue[dist.Store | Exception] = Queue()

    def construct() -> None:
        try:
            store = dist.TCPStore(
                host, port, None, is_master=is_host, timeout=timedelta(seconds=left_s), wait_for_workers=False,
                multi_tenant=True, use_libuv=use_libuv,
            )  # fmt: skip
        except Exception as error:
            outcome.put(error)
        else:
            outcome.put(store)

    threads.start(construct, "zrpc-store")
    try:
        made = outcome.get(timeout=left_s + CONNECT_S)
    except Empty:
        raise RuntimeError("what listens there does not answer as a store does") from None
    if isinstance(made, Exception):
        if "failed to listen" in str(made):  # torch has one class for all that goes wrong
            raise ListenError(str(made)) from made
        raise made
    return made


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Wait until something listens there.

    Raises:
        RuntimeError: nothing does by `deadline`; the text is the system's last one.
    """
    pause_s = RETRY_MIN_S
    while True:
        left_s = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(RETRY_MIN_S, min(left_s, CONNECT_S))):
                return
        except OSError as error:  # also where the name is not known yet
            if left_s < pause_s:
                raise RuntimeError(str(error)) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MAX_S)
