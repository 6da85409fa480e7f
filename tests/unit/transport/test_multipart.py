"""Messages come whole and once, wherever in one of them a destructor receives too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import zmq

from zrpc.transport.multipart import Messages
from zrpc.wire.envelope import INLINE_MAX_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGE = bytes(INLINE_MAX_NBYTES + 1)
SENT = [[b"a", b"1"], [b"b", b"1", b"2"], [b"c", LARGE, b"", b"3"], [b"d", b""]]


class Disturbed:
    """A socket where `disturb()` is called once, before part number `at` is taken: as a destructor would be."""

    def __init__(self, sock: zmq.Socket[bytes], at: int, disturb: Callable[[], None]) -> None:
        self._sock = sock
        self._at = at
        self._disturb = disturb

    def recv(self, flags: int, copy: bool) -> Any:
        self._at -= 1
        if self._at == -1:
            self._disturb()
        return self._sock.recv(flags, copy)


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.PAIR) as near, context.socket(zmq.PAIR) as far:
        near.bind("inproc://pair")
        far.connect("inproc://pair")
        yield near, far


@pytest.mark.parametrize("is_collected_between", [False, True])
@pytest.mark.parametrize("nested", [1, 2])
@pytest.mark.parametrize("at", range(sum(map(len, SENT))))
def test_each_message_comes_whole_and_once(
    pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]], at: int, nested: int, is_collected_between: bool
) -> None:
    """At whichever part it is disturbed, and however many messages are received there."""
    near, far = pair
    came: list[list[bytes]] = []

    def take() -> bool:
        message = messages.receive()
        if message:
            came.append([bytes(part) for part in message])
            assert type(message[0]) is bytes, "a source is a key"
        return bool(message)

    def disturb() -> None:
        for _ in range(nested):
            take()

    messages = Messages(Disturbed(far, at, disturb), is_collected_between=is_collected_between)  # type: ignore[arg-type]
    for parts in SENT:
        near.send_multipart(parts)
    for _ in range(len(SENT) + 1):
        take()
    assert sorted(came) == SENT
    assert not messages.receive()


def test_large_parts_are_not_copied(pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    near, far = pair
    near.send_multipart([b"source", LARGE, b"small"])
    assert list(map(type, Messages(far).receive())) == [bytes, memoryview, bytes]
