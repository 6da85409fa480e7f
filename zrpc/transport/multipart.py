"""Messages of a socket, received part by part, though a destructor may receive in the middle of one.

What: a destructor of a user may run wherever memory is made, and wait for an answer, so that its thread reads on: first
the message that was begun, if one was. So a part is kept as soon as it is taken, and what was begun is looked at anew
after each.

Invariants: a message is returned once, whole, and in the order of its parts.

Threads: belongs to the thread that reads the socket.

Failure: ZeroMQ gives no part before all of its message has come, so none is waited for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import zmq

from zrpc.wire.envelope import INLINE_MAX_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.transport.sockets import Socket
    from zrpc.wire.envelope import Buffer

    Check = Callable[[list[Buffer | zmq.Frame]], list[Buffer | zmq.Frame]]

_NOBLOCK = (int(zmq.NOBLOCK),)
_Frame = zmq.Frame


class Messages:
    """Receives the messages of `sock`. Each begins with its source, and has at least one more part.

    Args:
        sock: where they come.
        check: gives what is to be handed on for the parts of a message that came; None: those.
        is_collected_between: destructors may run between any two bytecodes; else only where a call makes memory.
    """

    def __init__(
        self, sock: Socket, check: Check | None = None, *, is_collected_between: bool = sys.version_info >= (3, 12)
    ) -> None:
        self._sock = sock
        self._check = check
        self._is_collected_between = is_collected_between
        self._begun: list[Buffer | zmq.Frame] = []  # of the message that is being received

    def receive(self) -> list[Buffer]:
        """The next message: its source and frames, small ones as bytes, large ones as views. Empty if there is none."""
        recv = self._sock.recv
        while True:
            rest: list[Buffer | zmq.Frame] = []  # what comes after; made first, since a destructor may run here
            begun = self._begun
            try:
                if self._is_collected_between:  # nothing comes between taking a part and keeping it
                    begun.extend(map(recv, _NOBLOCK, (not begun,)))
                else:  # half as long (`compare.py --tcp --only noop_us`: 2 %)
                    begun.append(recv(_NOBLOCK[0], not begun))
            except zmq.Again:
                return []
            part = begun[-1]
            if begun is not self._begun:  # the message was received meanwhile, and this is the first part of another
                begun = self._begun
                begun.append(part)
            if type(part) is _Frame and not part.more:  # the source, which is a copy, is never alone
                break
        self._begun = rest
        if self._check is not None:
            begun = self._check(begun)
        for index, part in enumerate(begun):
            if type(part) is _Frame:
                begun[index] = part.bytes if len(part) <= INLINE_MAX_NBYTES else part.buffer
        return begun  # type: ignore[return-value]
