"""What a worker does while the connection that it reaches others through is gone, and may come back.

Threads: `on_break` belongs to one that neither reads nor is the control thread; `on_resume` to any. The work is done on
the control thread.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.agent.client import Client
    from zrpc.control import ControlThread
    from zrpc.ids import Incarnation
    from zrpc.transport.carrier import Carrier

BREAK_S = 1.0
"""How long `on_break` waits for the control thread, whose tasks do not wait for others."""


class Outage:
    """Ends what was under way, holds what is new, and sends that later.

    Args:
        control: does the work.
        carrier: forgets what was on its way.
        client: its calls fail, or are held.
    """

    def __init__(self, control: ControlThread, carrier: Carrier, client: Client) -> None:
        self._control = control
        self._carrier = carrier
        self._client = client

    def on_break(self, peers: frozenset[Incarnation], reason: str) -> None:
        """The connection that these peers are reached through is gone. It returns when all that it means is done."""
        done = threading.Event()
        self._control.submit(lambda: self._carrier.break_off(peers))
        self._control.submit(lambda: self._client.break_off(peers, reason))
        self._control.submit(done.set)
        done.wait(BREAK_S)

    def on_resume(self) -> None:
        """There is such a connection again."""
        self._control.submit(self._client.resend_held)
