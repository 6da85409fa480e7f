"""Calls that may run twice, and are made again where the connection to the broker broke."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.errors import ConnectionLostError, PeerLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.call import Call


def outlast(start: Callable[[], Call], first: Call | None = None) -> None:
    """Wait for a call, and make it again while the connection breaks before it is answered.

    Args:
        start: makes the call.
        first: it is under way already.

    Raises:
        Exception: what became of the call; but where it was made again, and the peer says that what it asks for is
            over, the first one may have run.
    """
    is_repeated = False
    while True:
        try:
            (start() if first is None or is_repeated else first).wait()
        except ConnectionLostError:
            is_repeated = True
            continue
        except PeerLostError:
            if not is_repeated:
                raise
        return
