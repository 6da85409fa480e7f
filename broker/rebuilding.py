"""A run that a broker rebuilds from what its members say. Pure: what they say goes in, who is in comes out.

What: members whose broker died come to this one and say who they are, which others they take for members, and which
lives they were told are over. As a worker that is lost for one member must be lost for all, those that take each other
for lost wait until all that were named are back, or the time for that is over (`needs_others`).

Invariants: a life that is over for some and there for others can only be in or out. It is in if more members, itself
counted, take it for a member than were told that it is over; those are out then, as they cannot go on with it.

Threads: belongs to the broker's. Failure: who did not come back in time is lost.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from zrpc.errors import ProtocolError
from zrpc.ids import INCARNATION_NBYTES, WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zrpc.ids import Incarnation
    from zrpc.wire.rejoining import Rejoin

NAMED_MAX = 65_536
"""So many others may one member name."""

_RANK_END = 1 << 31

TOO_LATE = "it did not come back to the broker in time"
TWO_VIEWS = "the broker before told some members that it is lost, and others not"


class Named(NamedTuple):
    """A member, as another one tells of it."""

    name: str
    rank: int


@dataclass(slots=True)
class Rebuilding:
    """What the members of one run have said.

    Attributes:
        until: when it ends at the latest, in the broker's seconds.
        named: the members that others have named.
        views: of each one that came back: which members it named.
        over: of each one that came back, now or earlier: which lives it was told are over.
        settled: those that were welcomed before, with what they had named.
        is_partial: whether one that is back does not know its group yet, which is to be complete when it does.
    """

    until: float
    named: dict[Incarnation, Named] = field(default_factory=dict)
    views: dict[Incarnation, frozenset[Incarnation]] = field(default_factory=dict)
    over: dict[Incarnation, frozenset[Incarnation]] = field(default_factory=dict)
    settled: dict[Incarnation, frozenset[Incarnation]] = field(default_factory=dict)
    is_partial: bool = False

    @property
    def needs_others(self) -> bool:
        """Whether those that are back have to wait for others."""
        return (self.is_partial or bool(self.refused())) and bool(self.awaited())

    def next(self, until: float, seats: Iterable[Incarnation], absent: Iterable[Incarnation]) -> Rebuilding:
        """The one that follows, as another member comes back: those in `seats` are welcomed, `absent` were named."""
        known = self.settled | self.views
        settled = {life: known.get(life, frozenset()) for life in seats}
        over = {life: self.over.get(life, frozenset()) for life in settled}
        return Rebuilding(until, {life: self.named[life] for life in absent}, over=over, settled=settled)

    def add(self, source: Incarnation, said: Rejoin, until: float) -> None:
        """`source` is back; the others are waited for until `until` at least.

        Raises:
            ProtocolError: what it says of others cannot be.
        """
        named = {life: Named(name, rank) for life, name, rank in map(_named, _bounded(said.members))}
        over = frozenset(map(_life, _bounded(said.ended)))
        self.views[source] = frozenset(named)
        self.over[source] = over - {source}
        self.until = max(self.until, until)
        for life, one in named.items():
            self.named.setdefault(life, one)

    def take_in(self, source: Incarnation, until: float) -> None:
        """`source` is back, and was not told of its group yet; the others are waited for until `until` at least."""
        self.until = max(self.until, until)
        self.views[source] = self.over[source] = frozenset()
        self.is_partial = True

    def forget(self, source: Incarnation) -> None:
        """`source` is gone again: it is not waited for."""
        self.views.pop(source, None)
        self.over.pop(source, None)
        self.named.pop(source, None)
        self.settled.pop(source, None)

    def awaited(self) -> set[Incarnation]:
        """Those that were named and are not back; without those that more take for lost than for members."""
        return {life for life in self.named if not self._is_back(life) and self._majority(life) >= 0}

    def refused(self) -> dict[Incarnation, str]:
        """Of those that are back: who cannot stay, and why."""
        out: dict[Incarnation, str] = {}
        for life in {life for over in self.over.values() for life in over if self._is_back(life)}:
            if self._is_over(life):
                out[life] = TWO_VIEWS
            else:
                out |= {source: TWO_VIEWS for source, over in self.over.items() if life in over}
        return out

    def _is_over(self, life: Incarnation) -> bool:
        return any(life in over for over in self.over.values()) and self._majority(life) <= 0

    def _majority(self, life: Incarnation) -> int:
        """How many more take it for a member, itself counted, than for lost."""
        views = (*self.views.values(), *self.settled.values())
        against = sum(life in over for over in self.over.values())
        return sum(life in view for view in views) + self._is_back(life) - against

    def _is_back(self, life: Incarnation) -> bool:
        return life in self.views or life in self.settled


def _bounded(values: list[Any]) -> list[Any]:
    if len(values) > NAMED_MAX:
        raise ProtocolError(f"a worker names {len(values)} others, and may name {NAMED_MAX}")
    return values


def _life(value: object) -> Incarnation:
    if type(value) is not bytes or len(value) != INCARNATION_NBYTES:
        raise ProtocolError(f"{reprlib.repr(value)} is no life of a worker")
    return value


def _named(entry: object) -> tuple[Incarnation, str, int]:
    if type(entry) is list and [type(part) for part in entry] == [bytes, str, int] and 0 <= entry[2] < _RANK_END:
        try:
            info = WorkerInfo(entry[1], entry[2])
        except RuntimeError as error:
            raise ProtocolError(f"a member that is named has no name of a worker: {reprlib.repr(entry)}") from error
        return _life(entry[0]), info.name, info.id
    raise ProtocolError(f"{reprlib.repr(entry)} is no member")
