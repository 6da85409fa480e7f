"""Whether a message comes from the worker that it names, in a group whose workers have keys of their own.

What: the connection that a message came on has proved that it holds a key (`zrpc.transport.credentials`), which ZeroMQ
gives with each of its parts. The incarnation that the message names ends with the fingerprint of its worker's key
(`zrpc.keyring`). Both must be of one key, and that one valid.

Invariants: what does not fit is not handed on, and is told of once for each incarnation.

Threads: belongs to the thread that reads the socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import zmq

from zrpc.ids import INCARNATION_NBYTES, EndedLives

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation
    from zrpc.keyring import Keyring
    from zrpc.wire.envelope import Buffer

    Part: TypeAlias = Buffer | zmq.Frame

USER_ID = "User-Id"
"""What `Authenticator` has said of a connection: its key."""
PASSED_MAX = 65_536
"""So many senders are known to be what they say; then all are looked at anew."""


class Senders:
    """Checks senders.

    Args:
        keyring: says which key is whose.
        warn: takes what is to be logged. It must not block.
    """

    def __init__(self, keyring: Keyring, warn: Callable[[str], None]) -> None:
        self._keyring = keyring
        self._warn = warn
        self._table = keyring.table
        self._passed: dict[Incarnation, str] = {}  # by that table
        self._told = EndedLives()

    def is_from(self, life: Incarnation, part: zmq.Frame) -> bool:
        """Whether the connection that `part` came on is one of the worker in that life."""
        if self._table is not self._keyring.table or len(self._passed) > PASSED_MAX:
            self._table, self._passed = self._keyring.table, {}
        try:
            public = str(part.get(USER_ID))
        except zmq.ZMQError:  # it came from this process, which sends itself no messages of others
            return False
        return self._passed.get(life) == public or self._judge(life, public)

    def checked(self, parts: list[Part]) -> list[Part]:
        """The parts of a message, with the incarnation as its source, or of one that says nothing in its place.

        Args:
            parts: the routing id of its connection, which begins with an incarnation, and at least one frame.
        """
        source, first = parts[0], parts[1]
        if not isinstance(first, zmq.Frame) or not isinstance(source, bytes) or (len(parts) == 2 and not len(first)):
            return [b"", b""]
        life = source[:INCARNATION_NBYTES]
        return [life, *parts[1:]] if self.is_from(life, first) else [b"", b""]

    def _judge(self, life: Incarnation, public: str) -> bool:
        proved = self._keyring.table.by_public.get(public)
        named = self._keyring.entry_of(life)
        if proved is not None and proved is named and self._keyring.is_valid(public):
            self._passed[life] = public
            return True
        if self._told.note(life, public):
            holder = "a key that is not in the keyring" if proved is None else f"the key {proved.label!r}"
            whose = "another key" if named is None else f"the key {named.label!r}"
            reason = (
                "and that key was revoked" if proved is not None and proved is named else f"which is a life of {whose}"
            )
            self._warn(f"what comes from {life.hex()} over a connection of {holder} is dropped: {reason}")
        return False
