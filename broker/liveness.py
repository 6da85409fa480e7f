"""Which workers are alive. Pure: heartbeats and the time go in, probes and the lost come out.

Every worker says at each interval that it is alive; one that was silent for `missed_max` intervals is lost. That is
for workers that hang. One that died is found sooner: when some connection went away (`hint`), every worker is probed a
few times within a second, as a hint does not say whose connection it was and may come before a probe can fail.

A worker that is silent for a little longer than an interval is asked, and its kernel acknowledges that, if its host can
be reached. Where it does not, within two intervals of silence in all, the worker is lost (`Standing.GONE`). Else its
process stands still, or is busy: it is SUSPECTED, which changes nothing, and comes back or is lost by the rule above.

Time in which the broker itself did not run (a suspended machine, say) is nobody's silence and is not counted.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.ids import Incarnation

PROBE_DELAYS_S = (0.0, 0.02, 0.1, 0.4, 1.0)
LOOKS = 8
"""How often in an interval is looked."""
ASKED_AFTER = 1.25
SUSPECTED_AFTER = 2.0
"""Intervals of silence."""


class Standing(Enum):
    """What is thought of a worker."""

    HEARD = "it was heard of lately"
    ASKED = "it is silent, and was asked"
    SUSPECTED = "it is silent, and its host acknowledges: it stands still, or is busy"
    GONE = "it is silent, and so is its host"


class Liveness:
    """When each worker was last heard of.

    Args:
        interval_s: how often workers say that they are alive.
        missed_max: how many intervals of silence make a worker lost.
        now: the time at the start.
    """

    def __init__(self, interval_s: float, missed_max: int, now: float) -> None:
        self._interval_s = interval_s
        self._silence_max_s = interval_s * missed_max
        self._heard: dict[Incarnation, float] = {}
        self._standing: dict[Incarnation, Standing] = {}  # but HEARD
        self._probes: list[float] = []
        self._ticked = now

    def heard(self, member: Incarnation, now: float) -> None:
        """`member` sent something; it is watched from now on."""
        self._heard[member] = now

    def forget(self, member: Incarnation) -> None:
        """Watch `member` no longer."""
        self._heard.pop(member, None)
        self._standing.pop(member, None)

    def members(self) -> list[Incarnation]:
        """Who is watched."""
        return list(self._heard)

    def hint(self, now: float) -> None:
        """Somebody's connection went away: probe soon."""
        self._probes = [now + delay for delay in PROBE_DELAYS_S]

    def tick(self, now: float) -> tuple[list[Incarnation], bool]:
        """Who is lost now (they are forgotten), and whether it is time to probe everybody."""
        paused_s = now - self._ticked
        self._ticked = now
        if paused_s > self._interval_s:
            self._heard = {member: at + paused_s for member, at in self._heard.items()}
        lost = [member for member, at in self._heard.items() if now - at > self._silence_max_s]
        for member in lost:
            self.forget(member)
        due = [at for at in self._probes if at <= now]
        self._probes = [at for at in self._probes if at > now]
        return lost, bool(due)

    def look(
        self, now: float, is_host_gone: Callable[[Incarnation, float], bool]
    ) -> list[tuple[Incarnation, Standing]]:
        """Whose standing has changed. Those that are ASKED are to be sent something; those that are GONE are forgotten.

        Args:
            now: the time.
            is_host_gone: whether a host has acknowledged nothing for so many seconds, though it was sent something.
        """
        changed = []
        for member, at in list(self._heard.items()):
            was = self._standing.get(member, Standing.HEARD)
            becomes = self._judge(member, was, (now - at) / self._interval_s, is_host_gone)
            if becomes is not was:
                changed.append((member, becomes))
                self._standing[member] = becomes
            if becomes is Standing.GONE:
                self.forget(member)
            elif becomes is Standing.HEARD:
                self._standing.pop(member, None)
        return changed

    def _judge(
        self, member: Incarnation, was: Standing, silent: float, is_host_gone: Callable[[Incarnation, float], bool]
    ) -> Standing:
        """What is to be thought of a worker that was silent for so many intervals."""
        if silent < ASKED_AFTER:
            return Standing.HEARD
        if was is Standing.HEARD or silent < SUSPECTED_AFTER:
            return Standing.ASKED
        if is_host_gone(member, (SUSPECTED_AFTER - ASKED_AFTER) * self._interval_s):
            return Standing.GONE
        return Standing.SUSPECTED

    def wait_s(self, now: float) -> float:
        """How long nothing is due: `tick` is wanted after this."""
        soonest = min(self._probes, default=now + self._interval_s)
        return max(0.0, min(soonest - now, self._interval_s / LOOKS))
