"""How RRefs get into messages and out of them.

Pickling an RRef forks it. For whom it is pickled the pickler does not know; the hook does, which sees each call with
its destination before it leaves, on the thread that pickled it. So the reducer leaves each new fork with its thread,
and the hook takes those whose bytes are in the payload, notes who will hold them (the owner must know whose death ends
which fork) and announces them in the call's metadata.

The callee receives announced forks before it reads the payload: it asks their owners to count them all at once, waits
for the answers, and only then runs the function, which can therefore rely on its RRefs. Announced forks that nobody
took out of the payload (it could not be read, say) are given up when the request is served. Forks in answers are not
announced: their receiver tells an owner that it is the holder.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zrpc.agent.current import current_agent
from zrpc.errors import ProtocolError
from zrpc.rref.forkdata import ForkData
from zrpc.rref.ledger import Ledger
from zrpc.rref.rref import RRef, receive
from zrpc.wire import pickling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.ids import ForkId, WorkerInfo
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload

UNSENT_MAX = 1024
"""So many forks of one thread wait for the hook. Older ones travel without being announced, as those in answers do."""


class _Here(threading.local):
    """Forks of this thread: pickled and not sent yet; announced and not taken out of the payload yet."""

    def __init__(self) -> None:
        self.unsent: deque[ForkData] = deque(maxlen=UNSENT_MAX)
        self.announced: dict[ForkId, RRef[Any]] = {}


_here = _Here()


class ForkHook:
    """Tells the owner's ledger, and the callee, which forks a call carries."""

    key = "rref"

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """See `CallHook.send`: note that `to` holds the forks in `payload`, and announce them."""
        unsent = _here.unsent
        if not unsent:
            return None
        packed = [(fork, fork.pack()) for fork in unsent]
        unsent.clear()
        leaving = [(fork, raw) for fork, raw in packed if raw in payload.data]
        for fork, _ in leaving:
            self._ledger.sent(fork, to)
        return [raw for _, raw in leaving] or None

    @contextmanager
    def receive(self, source: WorkerInfo, meta: object, payload: Payload, is_reply: bool) -> Iterator[None]:
        """See `CallHook.receive`: receive the forks that `meta` announces, and wait until their owners count them."""
        if not isinstance(meta, list):
            raise ProtocolError(f"{source} announced the RRefs {meta!r}")
        announced = [receive(self._ledger, ForkData.unpack(raw), announced=True) for raw in meta]
        users = [rref._fork_id for rref in announced if rref._cell is None and rref._fork_id is not None]
        self._ledger.wait_confirmed(users)
        outer, _here.announced = _here.announced, {
            ForkData.unpack(raw).fork_id: rref for raw, rref in zip(meta, announced, strict=True)
        }  # fmt: skip
        del announced
        try:
            yield
        finally:
            _here.announced = outer


def _rebuild(packed: bytes) -> RRef[Any]:
    """Take an RRef out of a payload."""
    fork = ForkData.unpack(packed)
    announced = _here.announced.pop(fork.fork_id, None)
    return announced or receive(current_agent().extensions[Ledger], fork)


def _reduce(rref: RRef[Any]) -> tuple[Any, tuple[bytes]]:
    """Put an RRef into a payload."""
    fork = rref._fork()
    _here.unsent.append(fork)
    return _rebuild, (fork.pack(),)


pickling.register_reducer(RRef, _reduce)
