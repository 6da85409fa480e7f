"""The way of messages to one peer: on its shortcut, once there is one, as far as that takes them, and else around."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.transport.shortcuts import Shortcut
    from zrpc.wire.envelope import Buffer

SHORTCUT_AFTER = 32
"""Messages to a peer before a shortcut to it is made. Made at once, they cost 128 workers that all call each other
for the first time 20 s instead of 11."""


class Way:
    """Owned by the lock of its outbox.

    Args:
        make_shortcut: makes the shortcut, if there can be one. The way closes it.
    """

    __slots__ = ("_left_without", "_make_shortcut", "_shortcut")

    def __init__(self, make_shortcut: Callable[[], Shortcut | None]) -> None:
        self._make_shortcut: Callable[[], Shortcut | None] | None = make_shortcut
        self._shortcut: Shortcut | None = None
        self._left_without = SHORTCUT_AFTER

    def send(self, frames: Sequence[Buffer]) -> bool:
        """Send one message on the shortcut; false: it must go around."""
        return self._shortcut is not None and self._shortcut.send(frames)

    def go_around(self) -> list[Buffer]:
        """A message goes around: what comes before its frames."""
        if self._shortcut is not None:
            return [self._shortcut.go_around()]
        if self._make_shortcut is not None:
            self._left_without -= 1
            if not self._left_without:
                self._shortcut, self._make_shortcut = self._make_shortcut(), None
        return []

    def is_unread(self) -> bool:
        """See `Shortcut.is_unread`."""
        return self._shortcut is not None and self._shortcut.is_unread()

    def wait_read(self, timeout_s: float) -> None:
        """See `Shortcut.wait_read`."""
        if self._shortcut is not None:
            self._shortcut.wait_read(timeout_s)

    def close(self) -> None:
        """What was sent on the shortcut is received all the same; nothing is any more. Idempotent."""
        self._make_shortcut = None
        if self._shortcut is not None:
            self._shortcut.close()
