"""Opening a store at a host and port. It is torch's TCPStore; this process's client of it asks no name server.

What: TCPStore's constructor makes a server, on the host, and a client. It waits in C++, where Python's signal handlers
do not run: for its host to listen, for an answer (without heeding its time limit), for the names of addresses, which it
only logs, and on the host for all workers to connect. So the host is waited for in Python, and `StoreClient` is the
client. On the host torch's constructor runs on a thread of its own, with a socket that listens already; it is not
waited for.

Failure: where `StoreClient` does not understand the store, torch's own client is used, also on a thread of its own. The
thread is left behind where what listens never answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import time
from datetime import timedelta
from queue import Empty, Queue
from typing import TypeAlias

import torch.distributed as dist

from zrpc import threads
from zrpc.membership import name_service
from zrpc.membership.store_client import Connection, NotAStoreError, StoreClient
from zrpc.transport import sockets

log = logging.getLogger("zrpc")

CONNECT_S = 1.0
"""How long a connection is tried before it is tried anew."""
HANDSHAKE_S = 15.0
"""How long an answer is waited for before torch's own client is tried. A server of torch may wait 10 s for a name."""
RETRY_MIN_S = 0.02
RETRY_MAX_S = 0.5
BACKLOG = 4096
"""For connections that torch has not accepted yet; the system has a limit of its own."""
NO_ANSWER = "what listens there does not answer as a store does"


Opening: TypeAlias = "Queue[dist.Store | Exception]"
"""Where torch's store, or why there is none, will be."""


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
    opening = None
    if is_host:
        listener = _listen(host, port)
        opening = _open_torch_store(host, port, deadline, is_host=True, use_libuv=use_libuv, listener=listener)
        if listener is None:  # a process group of this process may have opened the store: torch knows it
            return _outcome_of(opening, deadline)
    try:
        return _open_client(host, port, deadline, opening)
    except NotAStoreError as error:
        reason = str(error)
    if opening is None:
        opening = _open_torch_store(host, port, deadline, is_host=False, use_libuv=use_libuv)
    store = _outcome_of(opening, deadline)
    log.warning("%s:%d: %s; torch's own client is used, which may wait for a name server", host, port, reason)
    return store


def _listen(host: str, port: int) -> socket.socket | None:
    """A socket that listens as torch's would; None: the port is taken, or torch is to say what is wrong.

    Where `host` is an IPv4 address, it is an IPv4 socket: so the addresses of those that connect are plain ones, and
    the system finds the names of those that are in /etc/hosts, as that of 127.0.0.1 is, without a name server.
    """
    with contextlib.suppress(OSError):
        if _is_ipv4(host) or not socket.has_dualstack_ipv6():
            return socket.create_server(("", port), backlog=BACKLOG)
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    return None


def _is_ipv4(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False


def _open_client(host: str, port: int, deadline: float, opening: Opening | None) -> dist.Store:
    """A client of torch's store that asks no name server; `opening` is kept as long as it.

    Raises:
        NotAStoreError: what listens is not known to be a store, or nothing does and `opening` has come to its end.
        RuntimeError: nothing listens by `deadline`.
    """
    sock = _connect(host, port, deadline, opening)
    limit_s = min(HANDSHAKE_S, _left_s(deadline) / 2)
    try:
        connection = Connection(sock, time.monotonic() + limit_s)
    except TimeoutError as error:
        raise NotAStoreError(f"it gave no answer within {limit_s:g} s") from error
    return StoreClient(connection, f"{host}:{port}", _left_s(deadline), opening)


def _connect(host: str, port: int, deadline: float, opening: Opening | None) -> socket.socket:
    """A connection to what listens there, as soon as something does.

    Raises:
        NotAStoreError: nothing does, though torch has made its store here, or cannot: `opening` tells which.
        RuntimeError: nothing does by `deadline`; the text is the system's last one.
    """
    pause_s = RETRY_MIN_S
    while True:
        left_s = deadline - time.monotonic()
        try:
            return sockets.open_connection(host, port, max(RETRY_MIN_S, min(left_s, CONNECT_S)))
        except OSError as error:  # also where the name is not known yet
            if opening is not None and not opening.empty():
                raise NotAStoreError(f"nothing answers there: {error}") from error
            if left_s < pause_s:
                raise RuntimeError(str(error)) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MAX_S)


def _open_torch_store(
    host: str, port: int, deadline: float, *, is_host: bool, use_libuv: bool, listener: socket.socket | None = None
) -> Opening:
    """Torch's own TCPStore, which is made on a thread of its own.

    Raises:
        LimitError: the system gives no thread.
    """
    opening: Opening = Queue()
    timeout = timedelta(seconds=_left_s(deadline))

    def construct() -> None:
        try:
            if is_host:
                name_service.prepare(host)
            store = dist.TCPStore(
                host, port, None, is_master=is_host, timeout=timeout, wait_for_workers=False, multi_tenant=True,
                master_listen_fd=None if listener is None else os.dup(listener.fileno()), use_libuv=use_libuv,
            )  # fmt: skip
        except Exception as error:
            opening.put(error)
            if listener is not None:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # those that have connected are not to wait for an answer
        else:
            opening.put(store)
        finally:
            if listener is not None:
                listener.close()

    try:
        threads.start(construct, "zrpc-store")
    except BaseException:
        if listener is not None:
            listener.close()
        raise
    return opening


def _outcome_of(opening: Opening, deadline: float) -> dist.Store:
    """The store that is being opened.

    Raises:
        ListenError: it cannot listen.
        RuntimeError: it cannot be opened, or not by `deadline`.
    """
    try:
        made = opening.get(timeout=_left_s(deadline) + CONNECT_S)
    except Empty:
        raise RuntimeError(NO_ANSWER) from None
    if isinstance(made, Exception):
        if "failed to listen" in str(made):  # torch has one class for all that goes wrong
            raise ListenError(str(made)) from made
        raise made
    return made


def _left_s(deadline: float) -> float:
    return max(RETRY_MAX_S, deadline - time.monotonic())
