"""Gatherings of named workers, as one of them knows them: who came, who is lost, and whether that is all. Pure.

See `zrpc.gather` for the two kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from zrpc.errors import PeerLostError
from zrpc.ids import EndedLives

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zrpc.ids import Incarnation


class WorkersLostError(PeerLostError):
    """All workers came to a gathering that survives losses, but those that are lost; the text names them."""


class LateError(PeerLostError):
    """Some workers did not come in time to a gathering that survives losses.

    Attributes:
        missing: their names.
    """

    def __init__(self, text: str, missing: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.missing = list(missing)


class Key(NamedTuple):
    """Which gathering.

    Attributes:
        names: of the workers, sorted.
        number: how many gatherings of this kind of the same lives came before.
        survives_loss: its kind; see `zrpc.gather`.
        lives: the incarnations of the workers, in the order of the names. A worker that comes again takes part in
            other gatherings than it did before.
    """

    names: tuple[str, ...]
    number: int
    survives_loss: bool = False
    lives: tuple[Incarnation, ...] = ()

    def life_of(self, name: str) -> Incarnation:
        """The incarnation of the worker of that name."""
        return self.lives[self.names.index(name)]

    def lost(self, ended: Mapping[Incarnation, str]) -> dict[str, str]:
        """Name -> reason of those of its workers that are among the lives `ended`."""
        reasons = [(name, ended.get(life)) for name, life in zip(self.names, self.lives, strict=False)]
        return {name: reason for name, reason in reasons if reason is not None}


@dataclass(frozen=True, slots=True)
class Lost:
    """Stands for the object of a worker that is lost."""

    reason: str


@dataclass(slots=True)
class Gathering:
    """What worker `me` knows of gathering `key`. Whoever calls it owns it.

    Attributes:
        key: which one.
        me: the name of the worker that this process is.
        objects: of the workers that came; once it is complete, and survives losses, of each worker.
        error: why it failed.
        is_complete: nothing more is waited for.
        is_led_here: this worker completed it, and has to tell the others.
        missing: which workers had not come when the leader gave up; None: it has not.
    """

    key: Key
    me: str
    objects: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    is_complete: bool = False
    is_led_here: bool = False
    missing: list[str] | None = None

    def leader(self, lost: dict[str, str]) -> str:
        """The first name; where losses are survived, the first one that is not in `lost` (name -> reason)."""
        if not self.key.survives_loss:
            return self.key.names[0]
        return next(name for name in self.key.names if name == self.me or name not in lost)

    def settle(self, lost: dict[str, str]) -> None:
        """Complete it if nothing more is to come, as far as that is for this worker to say."""
        if self.is_complete:
            return
        is_led_here = self.leader(lost) == self.me
        awaited = self.awaited()
        if self.key.survives_loss:
            if is_led_here and all(name in lost for name in awaited if name != self.me) and self.me not in awaited:
                self.objects |= {name: Lost(lost[name]) for name in self.key.names if name in lost and name != self.me}
                self.is_led_here = self.is_complete = True
        elif is_led_here and not awaited:
            self.is_led_here = self.is_complete = True
        else:
            decisive = awaited if is_led_here else self.key.names[:1]
            gone = next((name for name in decisive if name in lost), None)
            if gone is not None:
                self.fail(f"{gone} is lost ({lost[gone]})")

    def conclude(self, objects: dict[str, Any], error: str | None) -> None:
        """The leader has completed it."""
        if not self.is_complete:
            self.objects, self.error, self.is_complete = objects, error, True

    def fail(self, reason: str) -> None:
        """It is not waited for any longer."""
        if not self.is_complete:
            self.error, self.is_complete = reason, True

    def awaited(self) -> list[str]:
        """Which workers have not come, the lost ones among them."""
        return [name for name in self.key.names if name not in self.objects]


class GatheringTable:
    """The gatherings of one worker. Whoever calls it owns it, and may wait for the gatherings that it hands out.

    Args:
        me: tells the name of the worker that this process is, which is not known before it joins.
    """

    def __init__(self, me: Callable[[], str]) -> None:
        self._me = me
        self._gatherings: dict[Key, Gathering] = {}
        self._numbers: dict[Key, int] = {}  # key of number 0 -> number of the next one that begins here
        self._results: dict[Key, dict[str, Any]] = {}  # of gatherings that survive losses
        self._ended = EndedLives()

    def __len__(self) -> int:
        """Of how many gatherings, and series of gatherings of the same lives, something is kept."""
        return len(self._gatherings) + len(self._numbers) + len(self._results)

    def lost(self, key: Key) -> dict[str, str]:
        """Which workers of that gathering are lost, and why."""
        return key.lost(self._ended)

    def begin(self, first: Key) -> Gathering:
        """This worker takes part in the next gathering of the series that `first` began, or begins."""
        key = first._replace(number=self._numbers.get(first, 0))
        lost = self.lost(key)
        if key.survives_loss or not lost:
            self._numbers[first] = key.number + 1
        gathering = self._at(key)
        gathering.settle(lost)
        return gathering

    def end(self, key: Key) -> None:
        """This worker has had its part: what comes for that gathering is refused from now on."""
        self._gatherings.pop(key, None)

    def contribute(self, key: Key, name: str, obj: Any) -> dict[str, Any] | None:
        """`name` takes part with `obj`.

        Returns:
            What came of the gathering, if that survives losses and is complete already.

        Raises:
            PeerLostError: the gathering is over here, or will not be complete.
        """
        if (result := self._results.get(key)) is not None:
            return result
        if (why := self._why_refused(key)) is not None:
            raise PeerLostError(f"the gathering of {', '.join(key.names)} cannot be completed: {why}")
        gathering = self._at(key)
        gathering.objects[name] = obj
        self._settle(gathering)
        return None

    def conclude(self, key: Key, objects: dict[str, Any], error: str | None) -> None:
        """The leader has completed it, maybe before this worker has come to it."""
        if self._is_kept(key):
            gathering = self._at(key)
            gathering.conclude(objects, error)
            self._settle(gathering)

    def missing(self, key: Key) -> list[str]:
        """Which workers have not come to it, as far as this worker knows; without those that are lost."""
        gathering = self._gatherings.get(key) or Gathering(key, self._me())
        lost = self.lost(key)
        return [name for name in gathering.awaited() if name not in lost and key not in self._results]

    def give_up(self, key: Key, missing: list[str]) -> None:
        """The leader's time is over, and `missing` had not come to it."""
        if self._is_kept(key):
            self._at(key).missing = missing

    def lose(self, life: Incarnation, reason: str) -> list[tuple[Key, list[str]]]:
        """A life is over.

        Returns:
            Gatherings that this worker was to lead and has not begun, and will not, with the workers that have come.
        """
        over: list[tuple[Key, list[str]]] = []
        self._ended.note(life, reason)
        for key, gathering in list(self._gatherings.items()):
            self._settle(gathering)
            if life in key.lives and not key.survives_loss and self._is_to_come(key):
                del self._gatherings[key]
                if key.names[0] == self._me():
                    over.append((key, list(gathering.objects)))
        for first in [first for first in self._numbers if life in first.lives and not first.survives_loss]:
            del self._numbers[first]
        return over

    def _at(self, key: Key) -> Gathering:
        """The gathering of that key; others may begin it before this worker does."""
        gathering = self._gatherings.get(key)
        if gathering is None:
            gathering = self._gatherings[key] = Gathering(key, self._me())
        return gathering

    def _settle(self, gathering: Gathering) -> None:
        gathering.settle(self.lost(gathering.key))
        if gathering.is_complete and gathering.key.survives_loss:
            self._results[gathering.key] = gathering.objects

    def _is_kept(self, key: Key) -> bool:
        return key not in self._results and self._why_refused(key) is None

    def _why_refused(self, key: Key) -> str | None:
        """Why nothing is kept of what comes for that gathering; None: it is kept."""
        if key in self._gatherings:
            return None
        if not self._is_to_come(key):
            return f"{self._me()} has taken part in it, and waits no longer"
        lost = {} if key.survives_loss else self.lost(key)
        return next((f"{name} is lost ({reason})" for name, reason in lost.items()), None)

    def _is_to_come(self, key: Key) -> bool:
        """Whether this worker has not begun that gathering yet."""
        return key.number >= self._numbers.get(key._replace(number=0), 0)
