"""Who is in which group, by which name and rank. Pure: what workers say goes in, what should happen comes out.

Theory of operation. A group, known by its key, is used by one run after another; a `Run` is one of them.

- A static run (`world_size` > 0) is FORMING until the last worker has come; only then is anybody welcomed. While it is
  RUNNING it is full. Once a worker has left or was lost it is CLOSING: nobody can come in any more, and the next worker
  to register begins the next run of the same group. So workers may shut down and start again without waiting for the
  slowest to have left, and workers restarted after a crash find each other though a survivor still hangs about.
- A dynamic run (`world_size` 0) is OPEN: workers come and go, and a name or rank is free again when its holder is gone.
- A run whose last worker is gone is forgotten.
- A broker that starts knows nothing, and there may have been another one in its place. Members of that one say who they
  are (`Rejoin`), and their run is REBUILDING (`zrpc_broker.rebuilding`) until all that they name are back, or for
  `rejoin_wait_s`. Whoever registers meanwhile waits. As names and ranks would be given twice if newcomers to a dynamic
  group came first, those wait for the first `settle_s` seconds of a broker, too.

Ranks that workers leave to the broker (-1) are given out when a static run is complete, as somebody may still come and
ask for a certain one; in a dynamic run at once. They are the lowest free ones, in the order of arrival.
"""

from __future__ import annotations

import itertools
import os
import reprlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from zrpc.errors import ProtocolError
from zrpc.ids import EndedLives, WorkerInfo
from zrpc.wire.messages import Forming, Heartbeat, Joined, Left, Refused, Register, Welcome
from zrpc_broker.actions import Action, Admit, Dismiss, Tell
from zrpc_broker.rebuilding import TOO_LATE, Rebuilding

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.wire.rejoining import Rejoin

UNGIVEN = -1
GROUP_MAX_LENGTH = 256
RUN_NBYTES = 8

_OWN_GROUP = "or give this run a group of its own with ZRPC_GROUP"
_LOST = "this worker is lost for the others"
_STRANGER = "the broker does not know this worker: it took it for lost. Start the run again"


class Phase(Enum):
    FORMING = "static, and not all workers have come"
    RUNNING = "static and complete"
    CLOSING = "static, and somebody is gone already"
    OPEN = "dynamic: workers come and go"
    REBUILDING = "members of a broker that died come back"


@dataclass(slots=True)
class Seat:
    """One worker of a run."""

    incarnation: Incarnation
    name: str
    rank: int
    card: dict[str, Any]


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
        rebuilding: while it is REBUILDING: what its members have said.
        waiting: those that registered meanwhile.
    """

    key: str
    world_size: int
    room: int
    phase: Phase
    id: bytes = b""
    seats: dict[Incarnation, Seat] = field(default_factory=dict)
    rebuilding: Rebuilding = field(default_factory=lambda: Rebuilding(0.0))
    waiting: dict[Incarnation, Register] = field(default_factory=dict)

    def refusal(self, wanted: Register | Rejoin) -> str | None:
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
        now: the time at the start, in seconds.
        settle_s: see above.
        rejoin_wait_s: see above.
    """

    def __init__(
        self, heartbeat_interval_s: float, now: float = 0.0, settle_s: float = 0.0, rejoin_wait_s: float = 10.0
    ) -> None:
        self._interval_s = heartbeat_interval_s
        self._settled_at = now + settle_s
        self._rejoin_wait_s = rejoin_wait_s
        self._current: dict[str, Run] = {}
        self._run_of: dict[Incarnation, Run] = {}
        self._rebuilt: dict[tuple[str, bytes], Run] = {}  # runs of brokers before, by group and id
        self._rebuilding: dict[int, Run] = {}  # by room
        self._ended = EndedLives()
        self._waits_in: dict[Incarnation, Run] = {}
        self._rooms = itertools.count(1)

    def __contains__(self, incarnation: Incarnation) -> bool:
        return incarnation in self._run_of

    def run_of(self, incarnation: Incarnation) -> Run | None:
        """The run that a worker is in."""
        return self._run_of.get(incarnation)

    def register(self, incarnation: Incarnation, wanted: Register, now: float = 0.0) -> list[Action]:
        """A worker wants to come in."""
        if incarnation in self._run_of or incarnation in self._waits_in:
            reason: str | None = "this worker has registered already: call shutdown before the next init_rpc"
        else:
            reason = _malformed(wanted)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        run = self._open_run(wanted)
        if run.phase is Phase.OPEN and not run.seats and now < self._settled_at:
            self._begin_rebuilding(run, self._settled_at)
            self._current[run.key] = run
        if run.phase is Phase.REBUILDING:
            run.waiting[incarnation] = wanted
            self._waits_in[incarnation] = run
            return self.heartbeat(incarnation)
        reason = run.refusal(wanted)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        self._current[run.key] = run
        seat = self._seat(run, incarnation, wanted.name, wanted.rank, wanted.card)
        if run.phase is Phase.OPEN:
            return self._come_in(run, seat)
        if len(run.seats) < run.world_size:
            return [Tell(incarnation, self._forming(run))]
        return self._begin(run)

    def rejoin(self, incarnation: Incarnation, said: Rejoin, now: float) -> list[Action]:
        """A member comes back, whose broker died or cannot be reached."""
        if incarnation in self._run_of or incarnation in self._waits_in:
            return [Tell(incarnation, Refused("this worker is here already"))]
        if (reason := self._ended.get(incarnation)) is not None:
            return [Tell(incarnation, Refused(f"{_LOST}: {reason}. Start the run again"))]
        reason = _malformed(said) or _malformed_return(said)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        run = self._run_to_rebuild(said)
        reason = run.refusal(said)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        if run.phase is not Phase.REBUILDING:
            self._begin_rebuilding(run, now)
        try:
            run.rebuilding.add(incarnation, said, now + self._rejoin_wait_s)
        except ProtocolError as error:
            return [Tell(incarnation, Refused(str(error)))]
        self._rebuilt[run.key, said.run] = run
        if run.world_size == 0 or run.key not in self._current:
            self._current[run.key] = run
        self._seat(run, incarnation, said.name, said.rank, said.card)
        self._move_named(run)
        return self.tick(now)

    def tick(self, now: float) -> list[Action]:
        """What is due: runs are rebuilt where nothing more is awaited."""
        if not self._rebuilding:
            return []
        rebuilt = [run for run in self._rebuilding.values() if self._is_rebuilt(run, now)]
        return [action for run in rebuilt for action in self._end_rebuilding(run, now)]

    def count(self, group: str) -> int:
        """How many workers of that group are here."""
        return sum(run.key == group for run in self._run_of.values())

    def current(self, group: str) -> Run | None:
        """The run of that group that is there now, or is to be."""
        return self._current.get(group) or next((run for run in self._run_of.values() if run.key == group), None)

    def heartbeat(self, incarnation: Incarnation) -> list[Action]:
        """A worker says that it is alive."""
        if incarnation in self._waits_in:
            return [Tell(incarnation, Forming([], 0, self._interval_s))]
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

    # ---- rebuilding -------------------------------------------------------------------------------------------------

    def _run_to_rebuild(self, said: Rejoin) -> Run:
        """The run that a member was in: the one that others of it brought with them, or a new one of the same id.

        A dynamic group has one run. Newcomers may have begun it before the members came back.
        """
        run = self._rebuilt.get((said.group, said.run))
        if run is None and not said.world_size:
            run = self._current.get(said.group)
        if run is None:
            run = Run(said.group, said.world_size, next(self._rooms), Phase.OPEN, said.run)
        return run

    def _begin_rebuilding(self, run: Run, until: float) -> None:
        run.phase = Phase.REBUILDING
        run.rebuilding = run.rebuilding.next(until, run.seats)
        self._rebuilding[run.room] = run

    def _move_named(self, run: Run) -> None:
        """Members that others name and that registered, as they were not told that their run has begun, are back."""
        for life, named in list(run.rebuilding.named.items()):
            where = self._run_of.get(life)
            if where is None or where.phase is not Phase.FORMING or where.key != run.key:
                continue
            seat = where.seats.pop(life)
            if not where.seats and self._current.get(where.key) is where:
                self._current[where.key] = run
            del self._run_of[life]
            run.rebuilding.take_in(life)
            self._seat(run, life, named.name, named.rank, seat.card)

    def _seat(self, run: Run, incarnation: Incarnation, name: str, rank: int, card: dict[str, Any]) -> Seat:
        self._run_of[incarnation] = run
        return run.seats.setdefault(incarnation, Seat(incarnation, name, rank, card))

    def _is_rebuilt(self, run: Run, now: float) -> bool:
        is_settled = bool(run.world_size) or now >= self._settled_at
        return now >= run.rebuilding.until or (is_settled and not run.rebuilding.awaited())

    def _end_rebuilding(self, run: Run, now: float) -> list[Action]:
        """All are back that will be: they are welcomed, and those that registered meanwhile come in."""
        rebuilt = run.rebuilding
        del self._rebuilding[run.room]
        actions: list[Action] = []
        for life in rebuilt.awaited():
            self._ended.note(life, TOO_LATE)
        run.phase = Phase.OPEN
        for life, reason in rebuilt.refused().items():
            actions += [*self._remove(life, True, reason), Tell(life, Refused(f"{_LOST}: {reason}"))]
        back = [run.seats[life] for life in rebuilt.views if life in run.seats]
        if run.world_size:
            run.phase = Phase.RUNNING if len(run.seats) == run.world_size else Phase.CLOSING
        run.id = run.id or os.urandom(RUN_NBYTES)
        actions += [Admit(seat.incarnation, run.room) for seat in back]
        for other in run.seats:
            if other not in rebuilt.views:  # it came before they were back
                actions += [Tell(other, Joined(seat.incarnation, seat.name, seat.rank, seat.card)) for seat in back]
        actions += [Tell(s.incarnation, Welcome(s.rank, _members(run), self._interval_s, run.id)) for s in back]
        if not run.seats:
            self._forget_run(run)
        waiting, run.waiting = run.waiting, {}
        for life, wanted in waiting.items():
            del self._waits_in[life]
            actions += self.register(life, wanted, max(now, self._settled_at))
        return actions

    def _forget_run(self, run: Run) -> None:
        self._current = {key: one for key, one in self._current.items() if one is not run}
        self._rebuilt = {key: one for key, one in self._rebuilt.items() if one is not run}

    # ---- coming and going -------------------------------------------------------------------------------------------

    def _open_run(self, wanted: Register) -> Run:
        """The run that the worker would come into: the group's current one, or a new one."""
        run = self._current.get(wanted.group)
        if run is not None and run.phase is not Phase.CLOSING:
            return run
        phase = Phase.FORMING if wanted.world_size else Phase.OPEN
        return Run(wanted.group, wanted.world_size, next(self._rooms), phase, os.urandom(RUN_NBYTES))

    def _come_in(self, run: Run, seat: Seat) -> list[Action]:
        """Into a dynamic run. The others are told before the newcomer: they know it when its first message comes."""
        if seat.rank == UNGIVEN:
            seat.rank = run.lowest_free_rank()
        joined = Joined(seat.incarnation, seat.name, seat.rank, seat.card)
        others = [Tell(other, joined) for other in run.seats if other != seat.incarnation]
        return [
            Admit(seat.incarnation, run.room),
            *others,
            Tell(seat.incarnation, Welcome(seat.rank, _members(run), self._interval_s, run.id)),
        ]

    def _begin(self, run: Run) -> list[Action]:
        """The last worker of a static run has come."""
        run.phase = Phase.RUNNING
        for seat in run.seats.values():
            if seat.rank == UNGIVEN:
                seat.rank = run.lowest_free_rank()
        admissions = [Admit(incarnation, run.room) for incarnation in run.seats]
        members = _members(run)
        welcomes = [Tell(s.incarnation, Welcome(s.rank, members, self._interval_s, run.id)) for s in run.seats.values()]
        return [*admissions, *welcomes]

    def _remove(self, incarnation: Incarnation, lost: bool, reason: str) -> list[Action]:
        waits_in = self._waits_in.pop(incarnation, None)
        if waits_in is not None:
            del waits_in.waiting[incarnation]
        run = self._run_of.pop(incarnation, None)
        if run is None:
            return []
        self._ended.note(incarnation, reason)
        del run.seats[incarnation]
        if run.phase is Phase.REBUILDING:  # those that are back are not told of others yet
            run.rebuilding.forget(incarnation)
            settled = [other for other in run.seats if other not in run.rebuilding.views]
            return [Dismiss(incarnation), *(Tell(other, Left(incarnation, lost, reason)) for other in settled)]
        if not run.seats:
            self._forget_run(run)
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


def _malformed_return(said: Rejoin) -> str | None:
    """What is wrong with a return beside that."""
    if said.rank == UNGIVEN or type(said.run) is not bytes or len(said.run) != RUN_NBYTES:
        return f"{reprlib.repr(said.run)} stands for no run: install the same zrpc on workers and broker"
    return None


def _malformed(wanted: Register | Rejoin) -> str | None:
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
