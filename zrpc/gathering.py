"""One gathering of named workers, as one of them knows it: who came, who is lost, and whether that is all. Pure.

See `zrpc.gather` for the two kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zrpc.ids import Incarnation


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
        return {name: ended[life] for name, life in zip(self.names, self.lives, strict=False) if life in ended}


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
