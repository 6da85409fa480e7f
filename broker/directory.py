"""Who is in which group, by which name and rank. Pure: what workers say goes in, what should happen comes out.

Theory of operation. A group, known by its key, is used by one run after another; a `Run` is one of them.

- A static run (`world_size` > 0) is FORMING until the last worker has come; only then is anybody welcomed. While it is
  RUNNING it is full. Once a worker has left or was lost it is CLOSING: nobody can come in any more, and the next worker
  to register begins the next run of the same group. So workers may shut down and start again without waiting for the
  slowest to have left, and workers restarted after a crash find each other though a survivor still hangs about.
- A dynamic run (`world_size` 0) is OPEN: workers come and go, and a name or rank is free again when its holder is gone.
- A run whose last worker is gone is forgotten.

A broker that starts knows nothing, and there may have been another one in its place. Members of that one say who they
are, and which others they know (`Rejoin`). Each is welcomed at once, and the others that it named are absent: they are
members still, what they are sent waits (`Expect`), and they are lost where they are not back in `rejoin_wait_s`. Only
these wait:

- Members that take each other for lost, or whose static group had not been begun for all of them: the run is REBUILDING
  (`zrpc_broker.rebuilding`) until all are back, or for `rejoin_wait_s`.
- Newcomers to dynamic groups, for the first `settle_s` seconds of a broker: until then a name or rank that looks free
  may be a member's that is not back and was not named.
- Who wants the name or the rank of an absent member, until that one was absent for `CLAIM_S`. Then the absent one is
  lost: it is refused if it comes back later.
- Newcomers to a static group with absent members: it is complete, or the next run begins.

Ranks that workers leave to the broker (-1) are given out when a static run is complete, as somebody may still come and
ask for a certain one; in a dynamic run at once. They are the lowest free ones, in the order of arrival.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from zrpc.errors import ProtocolError
from zrpc.ids import EndedLives
from zrpc.wire.messages import Forming, Heartbeat, Joined, Left, Refused, Register, Welcome
from zrpc_broker.actions import Action, Admit, Dismiss, Expect, Release, Tell
from zrpc_broker.checks import malformed, malformed_return
from zrpc_broker.rebuilding import TOO_LATE, TWO_VIEWS
from zrpc_broker.runs import RUN_NBYTES, Absent, Phase, Run, Seat

if TYPE_CHECKING:
    from collections.abc import Collection

    from zrpc.ids import Incarnation
    from zrpc.wire.rejoining import Rejoin

CLAIM_S = 2.0
"""So long the name and the rank of a member that is absent are kept for it, if somebody else wants them."""

_LEFT = "it left the group"
_LOST = "this worker is lost for the others"
_STRANGER = "the broker does not know this worker: it took it for lost. Start the run again"


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
        self._unsettled: dict[int, Run] = {}  # by room
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
            reason = malformed(wanted)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        run = self._open_run(wanted)
        if incarnation in run.absent:
            return self._take_in(run, incarnation, wanted, now)
        if self._must_wait(run, wanted, now):
            self._current[run.key] = self._unsettled[run.room] = run
            run.waiting[incarnation] = wanted
            self._waits_in[incarnation] = run
            return self.heartbeat(incarnation)
        reason = run.refusal(wanted)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        self._current[run.key] = run
        claimed = [action for life in run.claimed(wanted) for action in self._give_up(run, life, True, TOO_LATE)]
        seat = self._seat(run, incarnation, wanted.name, wanted.rank, wanted.card)
        if run.phase is Phase.OPEN:
            return [*claimed, *self._come_in(run, seat)]
        if len(run.seats) < run.world_size:
            return [Tell(incarnation, self._forming(run))]
        return self._begin(run)

    def rejoin(self, incarnation: Incarnation, said: Rejoin, now: float) -> list[Action]:
        """A member comes back, whose broker died or cannot be reached."""
        if incarnation in self._run_of or incarnation in self._waits_in:
            return [Tell(incarnation, Refused("this worker is here already"))]
        if (reason := self._ended.get(incarnation)) is not None:
            return [Tell(incarnation, Refused(f"{_LOST}: {reason}. Start the run again"))]
        reason = malformed(said) or malformed_return(said)
        if reason is not None:
            return [Tell(incarnation, Refused(reason))]
        run = self._run_to_rebuild(said)
        reason = run.refusal(said, incarnation)
        if reason is not None:
            return [Tell(incarnation, Refused(f"{_LOST}: {reason}"))]
        if run.phase is not Phase.REBUILDING:
            run.begin_rebuilding(now)
        self._unsettled[run.room] = run
        try:
            run.rebuilding.add(incarnation, said, now + self._rejoin_wait_s)
        except ProtocolError as error:
            return [Tell(incarnation, Refused(str(error))), *self.tick(now)]
        self._rebuilt[run.key, said.run] = run
        if run.world_size == 0 or run.key not in self._current:
            self._current[run.key] = run
        run.absent.pop(incarnation, None)
        replaced = [action for life in run.claimed(said) for action in self._give_up(run, life, True, TOO_LATE)]
        self._seat(run, incarnation, said.name, said.rank, said.card)
        self._move_named(run, now)
        self._note_absent(run, now)
        return [*replaced, *self.tick(now)]

    def tick(self, now: float) -> list[Action]:
        """What is due: members that are not back are lost, runs go on, and those that waited come in."""
        actions: list[Action] = []
        for run in list(self._unsettled.values()):
            for life in [life for life, one in run.absent.items() if now >= one.until]:
                actions += self._give_up(run, life, True, TOO_LATE)
            if run.phase is Phase.REBUILDING and (now >= run.rebuilding.until or not run.rebuilding.needs_others):
                actions += self._end_rebuilding(run)
            for life, wanted in list(run.waiting.items()):
                if not self._must_wait(run, wanted, now):
                    del run.waiting[life], self._waits_in[life]
                    actions += self.register(life, wanted, now)
            if not run.is_unsettled:
                del self._unsettled[run.room]
                if not run.seats:
                    self._forget_run(run)
        return actions

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
        return [*self._remove(incarnation, False, _LEFT), Tell(incarnation, Left(incarnation, False, ""))]

    def lose(self, incarnation: Incarnation, reason: str) -> list[Action]:
        """A worker is gone without a goodbye."""
        return self._remove(incarnation, True, reason)

    # ---- rebuilding -------------------------------------------------------------------------------------------------

    def _must_wait(self, run: Run, wanted: Register, now: float) -> bool:
        """Whether a worker that registers for that run can neither be let in nor refused yet."""
        if run.phase is Phase.REBUILDING:
            return True
        if run.world_size:
            return bool(run.absent)
        return now < self._settled_at or any(now < run.absent[life].since + CLAIM_S for life in run.claimed(wanted))

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

    def _take_in(self, run: Run, life: Incarnation, wanted: Register, now: float) -> list[Action]:
        """One that was named registers: it was not told that it had come in."""
        if run.phase is not Phase.REBUILDING:
            run.begin_rebuilding(now)
        away = run.absent.pop(life)
        run.rebuilding.take_in(life, now + self._rejoin_wait_s)
        self._seat(run, life, away.name, away.rank, wanted.card)
        return self.tick(now)

    def _move_named(self, run: Run, now: float) -> None:
        """Members that others name and that registered, as they were not told that their run has begun, are back."""
        for life, named in list(run.rebuilding.named.items()):
            where = self._run_of.get(life)
            if where is None or where.phase is not Phase.FORMING or where.key != run.key:
                continue
            seat = where.seats.pop(life)
            if not where.seats and self._current.get(where.key) is where:
                self._current[where.key] = run
            del self._run_of[life]
            run.rebuilding.take_in(life, now)
            run.absent.pop(life, None)
            self._seat(run, life, named.name, named.rank, seat.card)

    def _seat(self, run: Run, incarnation: Incarnation, name: str, rank: int, card: dict[str, Any]) -> Seat:
        self._run_of[incarnation] = run
        for other in self._unsettled.values():
            other.absent.pop(incarnation, None)
        return run.seats.setdefault(incarnation, Seat(incarnation, name, rank, card))

    def _note_absent(self, run: Run, now: float) -> None:
        """Those that were named are absent; not one whose name or rank another one has, or that is here, or over."""
        names, ranks = {one.name for one in run.seats.values()}, {one.rank for one in run.seats.values()}
        for life in run.rebuilding.awaited() - run.absent.keys():
            named = run.rebuilding.named[life]
            is_here = life in self._run_of or life in self._waits_in
            if is_here or life in self._ended or named.name in names or named.rank in ranks:
                run.rebuilding.forget(life)
            else:
                run.absent[life] = Absent(named.name, named.rank, now, now + self._rejoin_wait_s)

    def _end_rebuilding(self, run: Run) -> list[Action]:
        """What members said fits together, or is made to: those that are back are welcomed."""
        rebuilt = run.rebuilding
        awaited = rebuilt.awaited()
        run.end_rebuilding()
        actions: list[Action] = []
        for life, reason in rebuilt.refused().items():
            actions += [*self._remove(life, True, reason), Tell(life, Refused(f"{_LOST}: {reason}"))]
        for life in run.absent.keys() - awaited:
            actions += self._give_up(run, life, True, TWO_VIEWS)
        back = [run.seats[life] for life in rebuilt.views if life in run.seats]
        actions += [Admit(seat.incarnation, run.room) for seat in back]
        actions += [Expect(life, run.room) for life in run.absent]
        for other in run.seats:
            if other not in rebuilt.views:  # it came before they were back
                actions += [Tell(other, Joined(seat.incarnation, seat.name, seat.rank, seat.card)) for seat in back]
        for seat in back:
            known = rebuilt.views[seat.incarnation]
            over = [(life, self._ended[life]) for life in known - run.seats.keys() if life in self._ended]
            actions += [Tell(seat.incarnation, Left(life, reason != _LEFT, reason)) for life, reason in over]
            actions.append(self._welcome(run, seat, known))
        return [*actions, *(Release(seat.incarnation) for seat in back)]

    def _give_up(self, run: Run, life: Incarnation, lost: bool, reason: str) -> list[Action]:
        """A member that is absent will not come back."""
        del run.absent[life]
        run.rebuilding.forget(life)
        self._ended.note(life, reason)
        run.note_gone()
        return [Dismiss(life), *self._tell_all(run, Left(life, lost, reason))]

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
        run.give_rank(seat.incarnation)
        joined = Joined(seat.incarnation, seat.name, seat.rank, seat.card)
        others = [Tell(other, joined) for other in run.seats if other != seat.incarnation]
        return [Admit(seat.incarnation, run.room), *others, self._welcome(run, seat)]

    def _begin(self, run: Run) -> list[Action]:
        """The last worker of a static run has come."""
        run.begin()
        admissions = [Admit(incarnation, run.room) for incarnation in run.seats]
        return [*admissions, *(self._welcome(run, seat) for seat in run.seats.values())]

    def _remove(self, incarnation: Incarnation, lost: bool, reason: str) -> list[Action]:
        waits_in = self._waits_in.pop(incarnation, None)
        if waits_in is not None:
            del waits_in.waiting[incarnation]
        run = self._run_of.pop(incarnation, None)
        if run is None:
            away = next((one for one in self._unsettled.values() if incarnation in one.absent), None)
            return [] if away is None else self._give_up(away, incarnation, lost, reason)
        self._ended.note(incarnation, reason)
        del run.seats[incarnation]
        if run.phase is Phase.FORMING:
            if not run.seats:
                self._forget_run(run)
            return []
        gone: list[Action] = [Dismiss(incarnation)]
        if run.phase is Phase.REBUILDING:
            run.rebuilding.forget(incarnation)
        elif not run.seats:
            self._forget_run(run)
            gone += [Dismiss(life) for life in run.absent]
            run.absent.clear()
        run.note_gone()
        return [*gone, *self._tell_all(run, Left(incarnation, lost, reason))]

    def _tell_all(self, run: Run, message: Left) -> list[Action]:
        """Those who were welcomed."""
        waiting = run.rebuilding.views if run.phase is Phase.REBUILDING else ()
        return [Tell(one, message) for one in run.seats if one not in waiting]

    def _welcome(self, run: Run, seat: Seat, known: Collection[Incarnation] = ()) -> Action:
        return Tell(seat.incarnation, Welcome(seat.rank, run.members(known), self._interval_s, run.id))

    def _forming(self, run: Run) -> Forming:
        return Forming([seat.name for seat in run.seats.values()], run.world_size, self._interval_s)
