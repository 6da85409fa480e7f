"""Endpoints of one process, and what came to them."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zrpc.secret import Secret
from zrpc.transport.credentials import Credentials
from zrpc.transport.peer import PeerEndpoint

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer

WAIT_S = 20.0
CREDENTIALS = Credentials(Secret("a secret of these endpoints"))
LOOPBACK = "tcp://127.0.0.1:0"


def mixed_message(thread: int, number: int, chance: random.Random) -> list[Buffer]:
    """Message `number` of a thread that sends: mostly small, a few of many packets, or of two frames."""
    kind = chance.random()
    rest: list[Buffer] = [bytes(200_000)] if kind < 0.01 else [b"two"] if kind < 0.02 else []
    return [bytes([thread]) + number.to_bytes(4, "little"), *rest]


def check_order(names: list[bytes], num_threads: int, count: int) -> None:
    """`names` are the first frames of `count` such messages of each thread, in the order in which they were sent."""
    for thread in range(num_threads):
        assert [int.from_bytes(name[1:], "little") for name in names if name[0] == thread] == list(range(count))


class Arrivals:
    """What came to one endpoint. Owned by the condition."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.messages: list[tuple[Incarnation, list[Buffer]]] = []
        self.lost: list[tuple[Incarnation, str]] = []

    def on_frames(self, source: Incarnation, frames: list[Buffer]) -> None:
        with self._changed:
            self.messages.append((source, frames))
            self._changed.notify_all()

    def on_lost(self, peer: Incarnation, reason: str) -> None:
        with self._changed:
            self.lost.append((peer, reason))
            self._changed.notify_all()

    def wait_messages(self, count: int) -> list[tuple[Incarnation, list[Buffer]]]:
        """The first `count` messages, once they are there."""
        self._wait(lambda: len(self.messages) >= count)
        return self.messages[:count]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The thread that reads is kept from taking messages meanwhile."""
        with self._changed:
            yield

    def wait_lost(self, count: int = 1) -> list[tuple[Incarnation, str]]:
        """The first `count` losses, once they are known."""
        self._wait(lambda: len(self.lost) >= count)
        return self.lost[:count]

    def _wait(self, come: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(come, WAIT_S), f"{len(self.messages)} messages, {len(self.lost)} losses"


class Peer:
    """An endpoint with its arrivals.

    Attributes:
        local: whether it has local links to the others. Tests change it.
    """

    local = False

    def __init__(self, credentials: Credentials = CREDENTIALS) -> None:
        self.arrivals = Arrivals()
        self.endpoint = PeerEndpoint(credentials.new_life(), LOOPBACK, local=self.local, credentials=credentials)
        self.id = self.endpoint.incarnation

    def start(self) -> None:
        self.endpoint.start(self.arrivals.on_frames, self.arrivals.on_lost)

    def knows(self, other: Peer) -> None:
        self.endpoint.connect(other.id, other.endpoint.address)


@contextmanager
def peers(count: int = 2, start: bool = True, credentials: Sequence[Credentials] = ()) -> Iterator[list[Peer]]:
    """Endpoints that all know each other, closed in the end; `credentials`: of the first ones."""
    made: list[Peer] = []
    try:
        made += [Peer(credentials[number] if number < len(credentials) else CREDENTIALS) for number in range(count)]
        for one in made:
            for other in made:
                one.knows(other)
            if start:
                one.start()
        yield made
    finally:
        for one in made:
            one.endpoint.close(0.0)
