"""The asking side: a process that looks into a group, and is no member of it.

What: an observer has an end of the transport, as a worker has, and a life of its own. It sends `Look` to workers, which
answer to it. With a broker it is let into the room of the group first; without, workers connect to where it listens, or
to its Unix socket. It knows of members by whatever found the group (`zrpc.sight.meeting`).

Threads: any may ask. `_changed` owns what came. Nothing is kept of answers that come too late.

Failure: a worker that does not answer in time has an `Answer` without anything seen. Where it cannot be reached,
that says why; else it may stand still, or code of its own may hold Python's lock.
"""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zrpc.errors import ZrpcError
from zrpc.transport.carrier import Carrier
from zrpc.wire.envelope import Envelope
from zrpc.wire.observing import Look, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zrpc.ids import Incarnation
    from zrpc.membership.found import FoundGroup
    from zrpc.membership.group import Member
    from zrpc.transport.endpoint import Endpoint

    OnSeen = Callable[[Incarnation, dict[str, Any]], None]


@dataclass
class Answer:
    """What came of one question.

    Attributes:
        seen: what the worker sees; None: it has not answered.
        took_s: how long that took.
        lost: why it cannot be reached; empty: it can, as far as it is known.
        life: which life has answered.
    """

    seen: dict[str, Any] | None = None
    took_s: float = 0.0
    lost: str = ""
    life: Incarnation = b""

    @property
    def has_come(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.seen is not None or bool(self.lost)


@dataclass
class _Asked:
    to: Incarnation
    at: float
    on_seen: OnSeen
    on_lost: Callable[[str], None] = field(default=lambda _: None)


class Observer:
    """See above. Close it.

    Args:
        endpoint: its end of the transport.
        address: where it listens; empty: nowhere.
        group: what it looks into.
        refresh: looks for members anew, and gives the group; None: that cannot be done.
        takes_any: who answers may be of another life than the one that was asked: only an address is known of it.
    """

    def __init__(
        self, endpoint: Endpoint, address: str, group: FoundGroup, refresh: Callable[[], FoundGroup] | None = None, *,
        takes_any: bool = False,
    ) -> None:  # fmt: skip
        self._takes_any = takes_any
        self.group = group
        self._endpoint = endpoint
        self._address = address
        self._refresh = refresh
        self._carrier = Carrier(endpoint, None)
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._asked: dict[int, _Asked] = {}
        self._talked_to: set[Incarnation] = set()
        self._carrier.start(self._on_envelope, self._on_lost, lambda: None)
        self.meet(group.members)

    def look_into(self, group: FoundGroup) -> None:
        """It is this group that it looks into."""
        self.group = group
        self.meet(group.members)

    def meet(self, members: Iterable[Member]) -> None:
        """These can be asked from now on."""
        for member in members:
            self._endpoint.add_peer(member.incarnation, member.card.get("address") or "")

    def refresh(self) -> FoundGroup:
        """Look for members anew."""
        if self._refresh is not None:
            self.look_into(self._refresh())
        return self.group

    def ask(
        self, to: Iterable[Incarnation], what: str, about: dict[str, Any] | None = None, timeout_s: float = 3.0
    ) -> dict[Incarnation, Answer]:
        """Ask several at once, and wait until all have answered, up to `timeout_s`."""
        answers = {life: Answer() for life in to}
        numbers = [self._begin(life, what, about or {}, answers[life]) for life in answers]
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: all(answer.has_come for answer in answers.values()), max(0.0, deadline - time.monotonic())
            )
            for number in numbers:
                self._asked.pop(number, None)
        return answers

    def follow(self, to: Incarnation, what: str, about: dict[str, Any], on_seen: OnSeen) -> int:
        """Ask for what comes again and again; the number of the question. `on_seen` runs on a reading thread.

        Raises:
            ZrpcError: the worker cannot be reached.
        """
        number = next(self._ids)
        with self._changed:
            self._asked[number] = _Asked(to, time.monotonic(), on_seen)
        self._send(to, what, about, number)
        return number

    def again(self, to: Incarnation, what: str, about: dict[str, Any], number: int) -> None:
        """Ask `follow`'s question again, so that it goes on. Raises what that does."""
        self._send(to, what, about, number)

    def close(self) -> None:
        """Tell those that were asked that this looks no more, and end. Idempotent."""
        for life in self._talked_to:
            with suppress(ZrpcError):
                self._send(life, "leave", {}, 0)
        self._talked_to = set()
        self._carrier.close(1.0)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, life: Incarnation, what: str, about: dict[str, Any], answer: Answer) -> int:
        number, began = next(self._ids), time.monotonic()

        def on_seen(source: Incarnation, seen: dict[str, Any]) -> None:
            answer.took_s, answer.life = time.monotonic() - began, source
            answer.seen = seen

        def on_lost(reason: str) -> None:
            answer.lost = answer.lost or reason or "it cannot be reached"

        with self._changed:
            self._asked[number] = _Asked(life, began, on_seen, on_lost)
        try:
            self._send(life, what, about, number)
        except ZrpcError as error:
            on_lost(str(error))
        return number

    def _send(self, life: Incarnation, what: str, about: dict[str, Any], number: int) -> None:
        self._carrier.send(life, Envelope(Look(what, about, self._address), number))
        if what != "leave":
            self._talked_to.add(life)

    def _on_envelope(self, source: Incarnation, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Seen):
            with self._changed:
                asked = self._asked.get(envelope.call_id)
                if asked is not None and (asked.to == source or self._takes_any):
                    asked.on_seen(source, message.seen)
                self._changed.notify_all()

    def _on_lost(self, peer: Incarnation, reason: str) -> None:
        with self._changed:
            for asked in self._asked.values():
                if asked.to == peer:
                    asked.on_lost(reason)
            self._changed.notify_all()
