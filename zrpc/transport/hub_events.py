"""What a hub (`zrpc.transport.hub`) has the broker see to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer


@dataclass(frozen=True, slots=True)
class Hello:
    """The receiver of `source` is connected."""

    source: Incarnation


@dataclass(frozen=True, slots=True)
class Replaced:
    """`source` has connected anew; the connection that it had before was not seen to end. The hub has forgotten it."""

    source: Incarnation


@dataclass(frozen=True, slots=True)
class Control:
    """`source` sent `frames` to the broker."""

    source: Incarnation
    frames: list[Buffer]


@dataclass(frozen=True, slots=True)
class Question:
    """A worker asks the broker something with `frames`; `asker` is where the answer goes (`Hub.answer`)."""

    asker: bytes
    frames: list[Buffer]


@dataclass(frozen=True, slots=True)
class Undelivered:
    """`source` addressed a worker that is not in its room."""

    source: Incarnation
    destination: Incarnation


@dataclass(frozen=True, slots=True)
class Unreachable:
    """`peer` is gone, or so slow that it is given up. The hub has forgotten it; it may have said hello again since."""

    peer: Incarnation
    reason: str


@dataclass(frozen=True, slots=True)
class Hint:
    """Some connection went away."""


Event = Hello | Replaced | Control | Question | Undelivered | Unreachable | Hint
