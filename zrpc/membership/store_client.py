"""A client of torch's TCPStore that asks no name server.

What: torch's own client asks for the name of the address that it connects to, only to be able to log it, and waits for
the answer: 10 s where the name server gives none. This one speaks the same protocol on a plain socket. The server is
torch's in any case, so keys are shared with all clients of torch: each key has the prefix "/" there, as torch's clients
give it.

Protocol, as of torch 2.13: a request is one byte that says what is asked for, then its arguments. Numbers are those of
the machine; strings have their length in eight bytes before them. The connection begins with VALIDATE and a magic
number, then PING and a number that comes back.

Threads: any. A lock keeps an exchange whole.

Failure: where the server does not answer in time, or an exchange was interrupted, the connection is closed, and what is
asked for later raises. It is not made anew: another store may have the port by then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from zrpc import interrupts

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

MAGIC = 0x3C85F7CE
PREFIX = "/"
POLL_MIN_S = 0.001
POLL_MAX_S = 0.1
READY = 0
MAX_VALUE_NBYTES = 1 << 28
"""What listens there may be no store. A roster of 100,000 workers is smaller."""


class Query(IntEnum):
    """What is asked for."""

    VALIDATE = 0
    SET = 1
    COMPARE_SET = 2
    GET = 3
    ADD = 4
    CHECK = 5
    NUM_KEYS = 7
    DELETE_KEY = 8
    APPEND = 9
    MULTI_GET = 10
    MULTI_SET = 11
    PING = 13


class NotAStoreError(RuntimeError):
    """What listens there does not answer as torch's store does, as far as this client knows."""


class Connection:
    """A connection to a TCPStore, which has answered.

    Args:
        sock: connected. It is closed with this.
        deadline: when the store must have answered (`time.monotonic`).

    Raises:
        NotAStoreError: the answer is not that of a store, or the connection was closed.
        TimeoutError: there is no answer by `deadline`.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        nonce = os.urandom(4)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.send(struct.pack("=BI", Query.VALIDATE, MAGIC) + struct.pack("=B", Query.PING) + nonce, deadline)
            answer = self.receive(len(nonce), deadline)
        except TimeoutError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise NotAStoreError(f"it does not answer as a store does: {error}") from error
        except BaseException:
            self.close()
            raise
        if answer != nonce:
            self.close()
            raise NotAStoreError("it does not answer as a store does")

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    @interrupts.uninterrupted
    def __del__(self) -> None:
        self._sock.close()

    def send(self, request: bytes, deadline: float) -> None:
        """Send all of `request`."""
        self._set_limit(deadline)
        self._sock.sendall(request)

    def receive(self, size: int, deadline: float) -> bytes:
        """The next `size` bytes.

        Raises:
            TimeoutError: they have not come by `deadline`.
            ConnectionError: the store closed the connection.
        """
        parts = []
        while size:
            self._set_limit(deadline)
            part = self._sock.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionResetError("the store closed the connection")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _set_limit(self, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left_s)


class StoreClient(dist.Store):
    """What `torch.distributed.TCPStore` is to a worker that does not host it.

    Args:
        connection: it is this client's from now on.
        where: the address, for messages.
        timeout_s: for each answer, and for keys that are waited for.
        kept: what is to live as long as this, such as the store's server.
    """

    def __init__(self, connection: Connection, where: str, timeout_s: float, kept: object = None) -> None:
        super().__init__()
        self._kept = kept
        self._connection = connection
        self._where = where
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._failure = ""

    @property
    def timeout(self) -> timedelta:
        """For each answer, and for keys that are waited for."""
        return timedelta(seconds=self._timeout_s)

    def set_timeout(self, timeout: timedelta) -> None:
        """Change `timeout`."""
        self._timeout_s = timeout.total_seconds()

    def set(self, key: str, value: str | bytes) -> None:
        """See `torch.distributed.Store`."""
        self._exchange(_request(Query.SET, _key(key), _text(value)), _no_answer)

    def get(self, key: str) -> bytes:
        """See `torch.distributed.Store`. Waits until the key is there."""
        self.wait([key])
        return self._exchange(_request(Query.GET, _key(key)), _Answer.text)

    def add(self, key: str, value: int) -> int:
        """See `torch.distributed.Store`."""
        return self._exchange(_request(Query.ADD, _key(key), struct.pack("=q", value)), _Answer.number)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """See `torch.distributed.Store`."""
        return self._exchange(_request(Query.COMPARE_SET, _key(key), _text(expected), _text(desired)), _Answer.text)

    def check(self, keys: list[str]) -> bool:
        """See `torch.distributed.Store`."""
        return self._exchange(_request(Query.CHECK, _count(keys), *map(_key, keys)), _Answer.byte) == READY

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """See `torch.distributed.Store`. It looks again and again, so that signal handlers run meanwhile."""
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        began = time.monotonic()
        pause_s = POLL_MIN_S
        while not self.check(keys):
            if time.monotonic() - began > limit_s:
                raise dist.DistStoreError(f"wait timeout after {limit_s:g} s, keys: {', '.join(keys)}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_MAX_S)

    def num_keys(self) -> int:
        """See `torch.distributed.Store`."""
        return self._exchange(_request(Query.NUM_KEYS), _Answer.number)

    def delete_key(self, key: str) -> bool:
        """See `torch.distributed.Store`."""
        return self._exchange(_request(Query.DELETE_KEY, _key(key)), _Answer.number) == 1

    def append(self, key: str, value: str | bytes) -> None:
        """See `torch.distributed.Store`."""
        self._exchange(_request(Query.APPEND, _key(key), _text(value)), _no_answer)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """See `torch.distributed.Store`. Waits until the keys are there."""
        self.wait(keys)
        return self._exchange(
            _request(Query.MULTI_GET, _count(keys), *map(_key, keys)), lambda answer: [answer.text() for _ in keys]
        )

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """See `torch.distributed.Store`."""
        pairs = (_key(key) + _text(value) for key, value in zip(keys, values, strict=True))
        self._exchange(_request(Query.MULTI_SET, _count(keys), *pairs), _no_answer)

    def has_extended_api(self) -> bool:
        """Whether there are `append`, `multi_get` and `multi_set`."""
        return True

    def _exchange(self, request: bytes, read: Callable[[_Answer], T]) -> T:
        """Send a request and read its answer. No signal handler runs meanwhile, where the agent has seen to that."""
        with interrupts.held, self._lock:
            if self._failure:
                raise dist.DistNetworkError(f"the store at {self._where} cannot be used any more: {self._failure}")
            deadline = time.monotonic() + self._timeout_s
            self._failure = "what was asked before was not answered"
            try:
                self._connection.send(request, deadline)
                result = read(_Answer(self._connection, deadline))
            except TimeoutError:
                self._failure = f"it gave no answer within {self._timeout_s:g} s"
            except OSError as error:
                self._failure = str(error)
            else:
                self._failure = ""
                return result
            finally:
                if self._failure:
                    with contextlib.suppress(OSError):
                        self._connection.close()
            raise dist.DistNetworkError(f"the store at {self._where} failed: {self._failure}")


class _Answer:
    """Reads an answer, part by part."""

    def __init__(self, connection: Connection, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def byte(self) -> int:
        return self._connection.receive(1, self._deadline)[0]

    def number(self) -> int:
        (value,) = struct.unpack("=q", self._connection.receive(8, self._deadline))
        return int(value)

    def text(self) -> bytes:
        nbytes = self.number()
        if not 0 <= nbytes <= MAX_VALUE_NBYTES:
            raise ConnectionError(f"it announced a value of {nbytes} bytes, and {MAX_VALUE_NBYTES} are the most")
        return self._connection.receive(nbytes, self._deadline)


def _no_answer(_: _Answer) -> None:
    """There is none."""


def _request(query: Query, *arguments: bytes) -> bytes:
    return bytes([query]) + b"".join(arguments)


def _text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else bytes(value)
    return struct.pack("=Q", len(raw)) + raw


def _key(key: str) -> bytes:
    return _text(PREFIX + key)


def _count(keys: list[str]) -> bytes:
    return struct.pack("=Q", len(keys))
