"""What the directory decides should happen; the broker carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.wire.messages import Message


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to a worker."""

    to: Incarnation
    message: Message


@dataclass(frozen=True, slots=True)
class Admit:
    """Let a worker reach, and be reached by, the others in `room`. Comes before anybody is told of it."""

    incarnation: Incarnation
    room: int


@dataclass(frozen=True, slots=True)
class Dismiss:
    """The opposite."""

    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Expect:
    """Keep what others in `room` send to a worker that is to come back there."""

    incarnation: Incarnation
    room: int


@dataclass(frozen=True, slots=True)
class Release:
    """Send a worker what was kept for it. Comes after it was told who the others are."""

    incarnation: Incarnation


Action = Tell | Admit | Dismiss | Expect | Release
