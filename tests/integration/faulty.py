"""A carrier that drops, delays or repeats messages of one type, as torch's faulty agent does for its tests."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

from zrpc.transport.carrier import Carrier

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Envelope
    from zrpc.wire.messages import Message

Fault = Literal["drop", "delay", "repeat"]
DELAY_S = 1.0

_send = Carrier.send


class Faults:
    """What happens to messages of one type that this worker sends. Any thread may send; the lock owns the numbers.

    Attributes:
        done: how many messages something was done to.
    """

    def __init__(self, victim: type[Message]) -> None:
        self.done = 0
        self._victim = victim
        self._lock = threading.Lock()
        self._fault: Fault = "drop"
        self._left = 0

    def arm(self, fault: Fault, times: int) -> None:
        """From now on do so to as many messages."""
        with self._lock:
            self._fault, self._left = fault, times

    def send(
        self, carrier: Carrier, peer: Incarnation, envelope: Envelope, by: Callable[..., None] = _send, **how: Any
    ) -> None:
        """In place of `Carrier.send`; `by`: what sends."""
        for _ in range(self._times(envelope)):
            by(carrier, peer, envelope, **how)
        if not self._is_delayed(envelope):
            return
        timer = threading.Timer(DELAY_S, by, (carrier, peer, envelope), how)
        timer.daemon = True
        timer.start()

    def _times(self, envelope: Envelope) -> int:
        with self._lock:
            if not self._is_hit(envelope):
                return 1
            if self._fault == "delay":
                return 0
            self._left -= 1
            self.done += 1
            return 0 if self._fault == "drop" else 2

    def _is_delayed(self, envelope: Envelope) -> bool:
        with self._lock:
            if not self._is_hit(envelope) or self._fault != "delay":
                return False
            self._left -= 1
            self.done += 1
            return True

    def _is_hit(self, envelope: Envelope) -> bool:
        return self._left > 0 and isinstance(envelope.message, self._victim)
