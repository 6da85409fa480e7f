"""A carrier that drops, repeats and delays some of what it sends."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from zrpc.transport.carrier import Carrier

if TYPE_CHECKING:
    import random

    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Envelope

DELAY_MAX_S = 0.5
DROPPED = 0.2
"""Of what may be missing: the messages that are not sent again. Of those that are, a third each."""


def make_lossy(share: float, rng: random.Random) -> None:
    """Let something happen to that share of the messages that this process sends."""
    send = Carrier.send
    lock = threading.Lock()

    def lossy(carrier: Carrier, peer: Incarnation, envelope: Envelope, **how: Any) -> None:
        with lock:
            chance, kind, delay_s = rng.random(), rng.random(), DELAY_MAX_S * rng.random()
        if chance >= share or peer == carrier.incarnation:
            send(carrier, peer, envelope, **how)
        elif kind < (1 / 3 if envelope.message.IDEMPOTENT else DROPPED):
            return
        elif kind < 2 / 3 and envelope.message.IDEMPOTENT:
            send(carrier, peer, envelope, **how)
            send(carrier, peer, envelope, **how)
        elif not envelope.buffers:  # memory that lies beside a message may be the program's
            timer = threading.Timer(delay_s, _send_late, (send, carrier, peer, envelope, how))
            timer.daemon = True
            timer.start()
        else:
            send(carrier, peer, envelope, **how)

    if share:
        Carrier.send = lossy  # type: ignore[method-assign]


def _send_late(send: Any, carrier: Carrier, peer: Incarnation, envelope: Envelope, how: dict[str, Any]) -> None:
    try:
        send(carrier, peer, envelope, **how)
    except RuntimeError:
        return  # the peer is lost, or this worker has shut down
