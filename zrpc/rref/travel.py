"""How RRefs get into messages and out of them.

Pickling an RRef forks it. For whom it is pickled the pickler does not know; the hook does, which sees each call and
answer with its destination before it leaves. So the reducer puts a `Departure` of each new fork on board the payload;
the hook notes who will hold the forks (the owner must know whose death ends which fork), and announces them in the
message's metadata. A departure that is freed before its payload has left gives its fork up, whatever kept it here: a
pickler that failed half way, a full window, an answer that cannot be sent.

The callee receives announced forks before it reads the payload: it asks their owners to count them all at once, waits
for the answers, and only then runs the function, which can therefore rely on its RRefs. The caller receives those of an
answer in the same way, and does not wait. Announced forks that nobody takes out of the payload (it could not be read,
say) are given up with it; so are those of an answer that comes too late for anybody to read it. Where a call ends
without an answer, its caller says so to the callee, as the request or the answer may be lost (`zrpc.rref.unanswered`).
"""

from __future__ import annotations

import reprlib
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from zrpc import interrupts
from zrpc.agent.current import current_agent
from zrpc.errors import ProtocolError, RRefError
from zrpc.rref.context import RRefContext
from zrpc.rref.forkdata import ForkData
from zrpc.rref.rref import RRef, receive
from zrpc.rref.unanswered import Unanswered
from zrpc.wire import carried, pickling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from zrpc.ids import WorkerInfo
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload


class Departure:
    """A fork on board a payload. It may be freed anywhere: it only leaves a note then."""

    __slots__ = ("_context", "_has_left", "fork")

    def __init__(self, context: RRefContext, fork: ForkData) -> None:
        self._context = context
        self._has_left = False
        self.fork = fork

    def has_left(self) -> None:
        """See `Passenger.has_left`."""
        self._has_left = True

    @interrupts.uninterrupted
    def __del__(self) -> None:
        if not self._has_left:
            self._context.note_unsent(self.fork)


class ForkHook:
    """Tells the owner's context, and the receiver, which forks a message carries."""

    key = "rref"
    is_idle = False

    def __init__(self, context: RRefContext) -> None:
        self._context = context
        self._unanswered = Unanswered(context.agent)

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """See `CallHook.send`: note that `to` holds the forks in `payload`, and announce them."""
        if not payload.passengers:
            return None
        leaving = [key for key in payload.passengers if payload.has_in_stream(key)]  # others may be elsewhere
        for key in leaving:
            self._context.sent(payload.passengers[key].fork, to)
        return leaving or None

    def receive(
        self, source: WorkerInfo, meta: object, payload: Payload, is_reply: bool
    ) -> AbstractContextManager[None]:
        """See `CallHook.receive`: receive the forks that `meta` announces.

        With a request it waits until their owners count them.
        """
        arrived = self._receive(source, meta)
        payload.passengers = arrived
        if is_reply:
            return nullcontext()
        users = [rref._fork_id for rref in arrived.values() if rref._cell is None and rref._fork_id is not None]
        self._context.wait_confirmed(users)
        return _leaving_nobody(payload)

    def carry_over(self) -> None:
        """See `CallHook.carry_over`."""

    def discard(self, meta: object) -> None:
        """See `PassengerHook.discard`: give up the forks that `meta` announces."""
        with suppress(RRefError):  # some are gone already
            self._receive(None, meta)

    def answering(self, to: WorkerInfo, call_id: int, meta: object) -> None:
        """See `PassengerHook.answering`: remember which forks go with it, in case that it is lost."""
        if isinstance(meta, list):
            forks = [ForkData.unpack(raw) for raw in meta]
            self._context.decide(lambda table: table.answering(to.incarnation, call_id, forks))

    def unanswered(self, to: WorkerInfo, call_id: int, meta: object) -> None:
        """See `PassengerHook.unanswered`: `to` is told, which may not have received the forks."""
        self._unanswered.note(to, call_id, meta if isinstance(meta, list) else [])

    def _receive(self, source: WorkerInfo | None, meta: object) -> dict[bytes, RRef[Any]]:
        """Receive the forks that `meta` announces, and empty it: each is received once.

        Raises:
            ProtocolError: it is something else.
            RRefError: one is gone. The others are received all the same.
        """
        if not isinstance(meta, list):
            raise ProtocolError(f"{source} announced the RRefs {reprlib.repr(meta)}")
        arrived: dict[bytes, RRef[Any]] = {}
        gone: RRefError | None = None
        while meta:
            raw = meta.pop()
            try:
                arrived[raw] = receive(self._context, ForkData.unpack(raw), announced=True)
            except RRefError as error:
                gone = error
        if gone is not None:
            raise gone
        return arrived


@contextmanager
def _leaving_nobody(payload: Payload) -> Iterator[None]:
    """After the body nothing is kept of what is still on board."""
    try:
        yield
    finally:
        payload.passengers = None


def _rebuild(packed: bytes) -> RRef[Any]:
    """Take an RRef out of a payload."""
    rref = pickling.alight(packed)
    return rref if isinstance(rref, RRef) else receive(current_agent().extensions[RRefContext], ForkData.unpack(packed))


def reduce(rref: RRef[Any]) -> tuple[Any, tuple[bytes]]:
    """Put an RRef into a payload."""
    with interrupts.held:  # else a fork would be counted that is not on board
        fork = rref._fork()
        packed = fork.pack()
        pickling.board(packed, Departure(rref._context, fork))
    return _rebuild, (packed,)


def _pack(rref: RRef[Any], packing: carried.Packing) -> bytes:
    """The same where nothing is pickled."""
    payload = packing.payload
    with interrupts.held:
        fork = rref._fork()
        packed = fork.pack()
        if payload.passengers is None:
            payload.passengers = {}
        payload.passengers[packed] = Departure(rref._context, fork)
    return packed


def _unpack(packed: bytes, unpacking: carried.Unpacking) -> RRef[Any]:
    passengers = unpacking.payload.passengers
    rref = passengers.pop(packed, None) if passengers else None
    return rref if isinstance(rref, RRef) else receive(current_agent().extensions[RRefContext], ForkData.unpack(packed))


pickling.register_reducer(RRef, reduce)
carried.register(RRef, carried.RREF, _pack, _unpack)
