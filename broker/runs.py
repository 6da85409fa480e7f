"""Runs: one use of a group each, with those who have a seat in it. Pure.

Invariants: no two seats of a run have one name, or one rank that was given out. What members of a broker that died
have named, and is not back yet, is absent: its name and rank are not free.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from zrpc_broker.rebuilding import Rebuilding

if TYPE_CHECKING:
    from collections.abc import Container

    from zrpc.ids import Incarnation
    from zrpc.wire.messages import Register
    from zrpc.wire.rejoining import Rejoin

UNGIVEN = -1
RUN_NBYTES = 8
OWN_GROUP = "or give this run a group of its own with ZRPC_GROUP"


class Phase(Enum):
    FORMING = "static, and not all workers have come"
    RUNNING = "static and complete"
    CLOSING = "static, and somebody is gone already"
    OPEN = "dynamic: workers come and go"
    REBUILDING = "members of a broker that died come back, and what they say of each other does not fit together yet"


@dataclass(slots=True)
class Seat:
    """One worker of a run."""

    incarnation: Incarnation
    name: str
    rank: int
    card: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Absent:
    """A member of a broker that died, which others have named and which is not back.

    Attributes:
        name: its name.
        rank: its rank.
        since: when it was first named.
        until: when it is lost.
    """

    name: str
    rank: int
    since: float
    until: float


@dataclass(slots=True)
class Run:
    """One use of a group, from its first worker's coming to its last one's going.

    Attributes:
        key: the group.
        world_size: how many workers it has; 0: it is dynamic.
        room: where the hub has them reach each other.
        phase: see `Phase`.
        id: what members say that come back to it.
        seats: its workers.
        absent: the members that are not back yet.
        rebuilding: what the members that came back have said.
        waiting: those that registered, and have to wait.
    """

    key: str
    world_size: int
    room: int
    phase: Phase
    id: bytes = b""
    seats: dict[Incarnation, Seat] = field(default_factory=dict)
    absent: dict[Incarnation, Absent] = field(default_factory=dict)
    rebuilding: Rebuilding = field(default_factory=lambda: Rebuilding(0.0))
    waiting: dict[Incarnation, Register] = field(default_factory=dict)

    @property
    def is_unsettled(self) -> bool:
        """Whether something is to happen by itself, when it is time."""
        return self.phase is Phase.REBUILDING or bool(self.absent or self.waiting)

    def begin(self) -> None:
        """It is static, and the last worker has come."""
        self.phase = Phase.RUNNING
        for incarnation in self.seats:
            self.give_rank(incarnation)

    def begin_rebuilding(self, now: float) -> None:
        """A member of a broker that died comes back."""
        self.phase = Phase.REBUILDING
        self.rebuilding = self.rebuilding.next(now, self.seats, self.absent)

    def end_rebuilding(self) -> None:
        """Those that are back go on."""
        self.phase = Phase.OPEN
        if self.world_size:
            is_complete = len(self.seats) + len(self.absent) == self.world_size
            self.phase = Phase.RUNNING if is_complete else Phase.CLOSING
        self.id = self.id or os.urandom(RUN_NBYTES)

    def note_gone(self) -> None:
        """A worker of it is gone for good."""
        if self.phase is Phase.RUNNING:
            self.phase = Phase.CLOSING

    def give_rank(self, incarnation: Incarnation) -> None:
        """The lowest free one, if it has none."""
        seat = self.seats[incarnation]
        if seat.rank == UNGIVEN:
            taken = {seat.rank for seat in self.seats.values()} | {one.rank for one in self.absent.values()}
            seat.rank = next(rank for rank in itertools.count() if rank not in taken)

    def refusal(self, wanted: Register | Rejoin, life: Incarnation = b"") -> str | None:
        """Why a worker cannot come in; None if it can."""
        if wanted.world_size != self.world_size:
            return (
                f"group {self.key!r} was begun with {_size(self.world_size)} and {wanted.name!r} came with "
                f"{_size(wanted.world_size)}: start all workers with the same, {OWN_GROUP}"
            )
        for seat in self.seats.values():
            if seat.name == wanted.name:
                return (
                    f"worker name {wanted.name} is not unique: a worker of group {self.key!r} has it (rank "
                    f"{'not given yet' if seat.rank == UNGIVEN else seat.rank}). Choose another name"
                )
            if wanted.rank != UNGIVEN and seat.rank == wanted.rank:
                return (
                    f"rank {wanted.rank} is taken by {seat.name!r} of group {self.key!r}: "
                    "start each worker with a rank of its own"
                )
        if self.phase is Phase.RUNNING and life not in self.absent:
            return (
                f"group {self.key!r} is complete: its {self.world_size} workers are running. "
                f"Wait until they are done, {OWN_GROUP}"
            )
        return None

    def claimed(self, wanted: Register | Rejoin) -> list[Incarnation]:
        """Those that are absent and have the name or the rank that a worker wants."""
        return [
            life
            for life, one in self.absent.items()
            if one.name == wanted.name or (wanted.rank != UNGIVEN and one.rank == wanted.rank)
        ]

    def members(self, known: Container[Incarnation] = ()) -> list[list[Any]]:
        """As in `Welcome`: all that are here, and those of the absent that are `known` already, without their cards."""
        here: list[list[Any]] = [[one.incarnation, one.name, one.rank, one.card] for one in self.seats.values()]
        away: list[list[Any]] = [[life, one.name, one.rank, {}] for life, one in self.absent.items() if life in known]
        return sorted(here + away, key=lambda entry: int(entry[2]))


def _size(world_size: int) -> str:
    return f"world_size={world_size}" if world_size else "no world_size (as a group that grows and shrinks)"
