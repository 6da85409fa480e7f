"""Who is in which group, by which name and rank. Pure: what workers say goes in, what should happen comes out.

Theory of operation. A group, known by its key, is used by one run after another; a `Run` is one of them.

- A static run (`world_size` > 0) is FORMING until the last worker has come; only then is anybody welcomed. While it is
  RUNNING it is full. Once a worker has left or was lost it is CLOSING: nobody can come in any more, and the next worker
  to register begins the next run of the same group. So workers may shut down and start again without waiting for the
  slowest to have left, and workers restarted after a crash find each other though a survivor still hangs about.
- A dynamic run (`world_size` 0) is OPEN: workers come and go, and a name or rank is free again when its holder is gone.
- A run whose last worker is gone is forgotten.

Ranks that workers leave to the broker (-1) are given out when a static run is complete, as somebody may still come and
ask for a certain one; in a dynamic run at once. They are the lowest free ones, in the order of arrival.
"""

from __future__ import annotations

import itertools
import reprlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from zrpc.ids import WorkerInfo
from zrpc.wire.messages import Forming, Heartbeat, Joined, Left, Refused, Register, Welcome
from zrpc_broker.actions import Action, Admit, Dismiss, Tell

if TYPE_CHECKING:
    from zrpc.ids import Incarnation

UNGIVEN = -1
GROUP_MAX_LENGTH = 256

_OWN_GROUP = "or give this run a group of its own with ZRPC_GROUP"
_STRANGER = "the broker does not know this worker: it took it for lost, or was restarted. Start the run again"


class Phase(Enum):
    FORMING = "static, and not all workers have come"
    RUNNING = "static and complete"
    CLOSING = "static, and somebody is gone already"
    OPEN = "dynamic: workers come and go"


@dataclass(slots=True)
class Seat:
    """One worker of a run."""

    incarnation: Incarnation
    name: str
    rank: int
    card: dict[str, Any]


@dataclass(slots=True)
class Run:
    """One use of a group, from its first worker's coming to its last one's going."""

    key: str
    world_size: int
    room: int
    phase: Phase
    seats: dict[Incarnation, Seat] = field(default_factory=dict)

    def refusal(self, wanted: Register) -> str | None:
        """Why a worker cannot come in; None if it can."""
        if wanted.world_size != self.world_size:
            return (
                f"group {self.key!r} was begun with {_size(self.world_size)} and {wanted.name!r} came with "
                f"{_size(wanted.world_size)}: start all workers with the same, {_OWN_GROUP}"
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
        if self.phase is Phase.RUNNING:
            return (
                f"group {self.key!r} is complete: its {self.world_size} workers are running. "
                f"Wait until they are done, {_OWN_GROUP}"
            )
        return None

    def lowest_free_rank(self) -> int:
        taken = {seat.rank for seat in self.seats.values()}
        return next(rank for rank in itertools.count() if rank not in taken)


class Directory:
    """All runs of all groups.

    Args:
        heartbeat_interval_s: passed on to the workers.
    """

    def __init__(self, heartbeat_interval_s: float) -> None:
        self._interval_s = heartbeat_interval_s
        self._current: dict[str, Run] = {}
        self._run_of: dict[Incarnation, Run] = {}
        self._rooms = itertools.count(1)

    def __contains__(self, incarnation: Incarnation) -> bool:
        return incarnation in self._run_of

    def run_of(self, incarnation: Incarnation) -> Run | None:
        """The run that a worker is in."""
        return self._run_of.get(incarnation)

    def register(self, incarnation: Incarnation, wanted: Register) -> list[Action]:
        """A worker wants to come in."""
        if incarnation in self._run_of:
            reason: str | None = "this worker has registered already: call shutdown before the next init_rpc"
        else:
            reason = _malformed(wanted)
        if reason is None:
            run = self._open_run(wanted)
            reason = run.refusal(wanted)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        self._current[run.key] = run
        self._run_of[incarnation] = run
        seat = run.seats[incarnation] = Seat(incarnation, wanted.name, wanted.rank, wanted.card)
        if run.phase is Phase.OPEN:
            return self._come_in(run, seat)
        if len(run.seats) < run.world_size:
            return [Tell(incarnation, self._forming(run))]
        return self._begin(run)

    def heartbeat(self, incarnation: Incarnation) -> list[Action]:
        """A worker says that it is alive."""
        run = self._run_of.get(incarnation)
        if run is None:
            return [Tell(incarnation, Refused(_STRANGER))]
        return [Tell(incarnation, self._forming(run) if run.phase is Phase.FORMING else Heartbeat())]

    def leave(self, incarnation: Incarnation) -> list[Action]:
        """A worker says goodbye; it is told when that is done."""
        return [*self._remove(incarnation, False, "it left the group"), Tell(incarnation, Left(incarnation, False, ""))]

    def lose(self, incarnation: Incarnation, reason: str) -> list[Action]:
        """A worker is gone without a goodbye."""
        return self._remove(incarnation, True, reason)

    def _open_run(self, wanted: Register) -> Run:
        """The run that the worker would come into: the group's current one, or a new one."""
        run = self._current.get(wanted.group)
        if run is not None and run.phase is not Phase.CLOSING:
            return run
        phase = Phase.FORMING if wanted.world_size else Phase.OPEN
        return Run(wanted.group, wanted.world_size, next(self._rooms), phase)

    def _come_in(self, run: Run, seat: Seat) -> list[Action]:
        """Into a dynamic run. The others are told before the newcomer: they know it when its first message comes."""
        if seat.rank == UNGIVEN:
            seat.rank = run.lowest_free_rank()
        joined = Joined(seat.incarnation, seat.name, seat.rank, seat.card)
        others = [Tell(other, joined) for other in run.seats if other != seat.incarnation]
        return [
            Admit(seat.incarnation, run.room),
            *others,
            Tell(seat.incarnation, Welcome(seat.rank, _members(run), self._interval_s)),
        ]

    def _begin(self, run: Run) -> list[Action]:
        """The last worker of a static run has come."""
        run.phase = Phase.RUNNING
        for seat in run.seats.values():
            if seat.rank == UNGIVEN:
                seat.rank = run.lowest_free_rank()
        admissions = [Admit(incarnation, run.room) for incarnation in run.seats]
        members = _members(run)
        welcomes = [Tell(s.incarnation, Welcome(s.rank, members, self._interval_s)) for s in run.seats.values()]
        return [*admissions, *welcomes]

    def _remove(self, incarnation: Incarnation, lost: bool, reason: str) -> list[Action]:
        run = self._run_of.pop(incarnation, None)
        if run is None:
            return []
        del run.seats[incarnation]
        if not run.seats and self._current.get(run.key) is run:
            del self._current[run.key]
        if run.phase is Phase.FORMING:
            return []
        if run.phase is Phase.RUNNING:
            run.phase = Phase.CLOSING
        return [Dismiss(incarnation), *(Tell(other, Left(incarnation, lost, reason)) for other in run.seats)]

    def _forming(self, run: Run) -> Forming:
        return Forming([seat.name for seat in run.seats.values()], run.world_size, self._interval_s)


def _members(run: Run) -> list[list[Any]]:
    """As in `Welcome`."""
    return [[s.incarnation, s.name, s.rank, s.card] for s in sorted(run.seats.values(), key=lambda s: s.rank)]


def _size(world_size: int) -> str:
    return f"world_size={world_size}" if world_size else "no world_size (as a group that grows and shrinks)"


def _malformed(wanted: Register) -> str | None:
    """What is wrong with a registration whatever the group."""
    values: list[object] = [wanted.name, wanted.rank, wanted.world_size, wanted.card, wanted.group]
    if [type(value) for value in values] != [str, int, int, dict, str]:
        return f"{reprlib.repr(wanted)} is malformed: install the same zrpc on workers and broker"
    if len(wanted.group) > GROUP_MAX_LENGTH:
        return (
            f"the name of a group has {len(wanted.group)} characters, and may have {GROUP_MAX_LENGTH}: choose another"
        )
    try:
        WorkerInfo(wanted.name, wanted.rank)
    except RuntimeError as error:
        return str(error)
    if wanted.world_size < 0:
        return f"world_size is {wanted.world_size}: it must be 1 or more, or none for a group that grows and shrinks"
    if wanted.rank < UNGIVEN or (wanted.world_size and wanted.rank >= wanted.world_size):
        wish = f"from 0 to {wanted.world_size - 1} (world_size - 1)" if wanted.world_size else "0 or more"
        return f"rank {wanted.rank} of {wanted.name!r} is out of range: it must be {wish}, or -1 to be given one"
    return None
