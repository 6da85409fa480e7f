"""The messages of a worker that knows its group, and looks for a broker that does, too.

They are apart from `zrpc.wire.messages` as workers without a broker have no use for them. docs/wire.md lists them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zrpc.wire.messages import Message, message_type


@message_type(48)
@dataclass(frozen=True, slots=True)
class Rejoin(Message):
    """A member comes back, as its connection to a broker broke: its own record, and what it knows of its group.

    `run` is from its `Welcome`. `members` holds an `[incarnation, name, rank]` for every other one that it takes for a
    member, `ended` the lives that it was told are over.
    """

    name: str
    rank: int
    world_size: int
    card: dict[str, Any]
    group: str
    run: bytes
    members: list[Any]
    ended: list[Any]


@message_type(49, idempotent=True)
@dataclass(frozen=True, slots=True)
class Locate(Message):
    """Is this group here? A worker that knows several brokers to each of them; answered with `Located`."""

    group: str


@message_type(50, idempotent=True)
@dataclass(frozen=True, slots=True)
class Located(Message):
    """So many workers of the group are here."""

    count: int
