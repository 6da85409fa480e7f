"""Opening a store at a host and port: as its host, torch's TCPStore; else a client of it that asks no name server.

TCPStore's constructor waits in C++, where Python's signal handlers do not run: for its host to listen, for its answer
(without heeding its time limit) and, on the host, for all workers to connect. So the host is waited for in Python. Where
torch's constructor is needed (on the host, and for a store that `StoreClient` does not understand), it runs on a thread
of its own, which is left behind where what listens never answers.
"""

from __future__ import annotations

import logging
import socket
import time
from datetime import timedelta
from queue import Empty, Queue
from typing import TYPE_CHECKING

from zrpc import threads
from zrpc.membership import name_service

if TYPE_CHECKING:
    import torch.distributed as dist

log = logging.getLogger("zrpc")

CONNECT_S = 1.0
"""How long a connection is tried before it is tried anew."""
RETRY_MIN_S = 0.02
RETRY_MAX_S = 0.5
NO_ANSWER = "what listens there does not answer as a store does"


class ListenError(RuntimeError):
    """The store cannot be opened here: its port is taken, say."""


def open_tcp_store(host: str, port: int, *, is_host: bool, timeout_s: float, use_libuv: bool = True) -> dist.Store:
    """The store at `host` and `port`; with `is_host` this process opens it there.

    Raises:
        ListenError: this process is the host and cannot listen there. It is not tried again.
        RuntimeError: the store does not answer within `timeout_s` seconds; the text is the system's, or torch's.
        LimitError: the system gives no thread.
    """
    deadline = time.monotonic() + timeout_s
    if is_host:
        name_service.prepare(host)
        return _open_torch_store(host, port, is_host=True, deadline=deadline, use_libuv=use_libuv)
    from zrpc.membership.store_client import Connection, NotAStoreError, StoreClient

    sock = _connect(host, port, deadline)
    try:
        return StoreClient(Connection(sock, deadline), f"{host}:{port}", timeout_s)
    except TimeoutError as error:
        raise RuntimeError(NO_ANSWER) from error
    except NotAStoreError as error:
        log.warning("%s:%d: %s; torch's own client is tried, which may wait for a name server", host, port, error)
    return _open_torch_store(host, port, is_host=False, deadline=deadline, use_libuv=use_libuv)


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to what listens there, as soon as something does.

    Raises:
        RuntimeError: nothing does by `deadline`; the text is the system's last one.
    """
    pause_s = RETRY_MIN_S
    while True:
        left_s = deadline - time.monotonic()
        try:
            return socket.create_connection((host, port), timeout=max(RETRY_MIN_S, min(left_s, CONNECT_S)))
        except OSError as error:  # also where the name is not known yet
            if left_s < pause_s:
                raise RuntimeError(str(error)) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MAX_S)


def _open_torch_store(host: str, port: int, *, is_host: bool, deadline: float, use_libuv: bool) -> dist.Store:
    """Torch's own TCPStore. Raises as `open_tcp_store` does."""
    import torch.distributed as dist

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
        raise RuntimeError(NO_ANSWER) from None
    if isinstance(made, Exception):
        if "failed to listen" in str(made):  # torch has one class for all that goes wrong
            raise ListenError(str(made)) from made
        raise made
    return made
