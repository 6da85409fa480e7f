"""Connections that a forked child inherits.

What: a child has a copy of every descriptor of its parent. While it lives, the system keeps the parent's connections
open, and goes on to acknowledge what comes, even if the parent has died: so its peers would not notice. In the child,
these descriptors are therefore replaced at once by ones of `/dev/null`.

Invariants: only sockets of zrpc are replaced, which are known by their names, and its memory files. The numbers stay
taken, so objects that the child has of its parent do no harm when they are freed. Memory that is mapped stays mapped:
tensors that the parent had received can be read in the child.

Threads: runs in the child, which has no other thread, and takes no lock. Failure: what cannot be looked at is left.
"""

from __future__ import annotations

import os
import socket
import stat
import weakref
from contextlib import suppress
from typing import Protocol

from zrpc.transport.local_socket import PREFIX, SUFFIX

_MEMORY_FILES = "/memfd:zrpc-"
_DESCRIPTORS = "/proc/self/fd"


class Connected(Protocol):
    """An endpoint whose connections a child is to let go of."""

    def local_ports(self) -> set[int]:
        """The TCP ports that it listens on."""

    def remote_addresses(self) -> set[tuple[str, int]]:
        """The TCP addresses that it connects to."""


_endpoints: weakref.WeakSet[Connected] = weakref.WeakSet()


def drop_in_children(endpoint: Connected) -> None:
    """From now on children let go of the connections of `endpoint`."""
    _endpoints.add(endpoint)


def _after_in_child() -> None:
    endpoints = list(_endpoints)
    _endpoints.clear()
    if not endpoints or not os.path.isdir(_DESCRIPTORS):
        return
    ports: set[int] = set().union(*(endpoint.local_ports() for endpoint in endpoints))
    addresses: set[tuple[str, int]] = set().union(*(endpoint.remote_addresses() for endpoint in endpoints))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for entry in os.listdir(_DESCRIPTORS):
        descriptor = int(entry)
        with suppress(OSError):
            if descriptor != null and _is_ours(descriptor, ports, addresses):
                os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def _is_ours(descriptor: int, ports: set[int], addresses: set[tuple[str, int]]) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return os.readlink(f"{_DESCRIPTORS}/{descriptor}").startswith(_MEMORY_FILES)
    sock = socket.socket(fileno=descriptor)
    try:
        if sock.family == socket.AF_UNIX:
            return any(_is_local(name) for name in (sock.getsockname(), _peer_name(sock)))
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        peer = _peer_name(sock)
        return sock.getsockname()[1] in ports or (isinstance(peer, tuple) and tuple(peer[:2]) in addresses)
    finally:
        sock.detach()


def _peer_name(sock: socket.socket) -> object:
    try:
        return sock.getpeername()
    except OSError:  # it listens
        return None


def _is_local(name: object) -> bool:
    """Whether it is the name of a Unix socket of zrpc."""
    return isinstance(name, str) and os.path.basename(name).startswith(PREFIX) and name.endswith(SUFFIX)


os.register_at_fork(after_in_child=_after_in_child)
