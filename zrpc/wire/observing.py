"""The messages of an observer: a command that looks into a group and is no member of it.

An observer asks a broker to be let in (`Attach`), and each worker what it wants to know (`Look`). All that is asked and
answered is of msgpack's types: nothing is unpickled. docs/wire.md lists them; docs/sight.md says what can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zrpc.wire.messages import Line, Message, message_type

OBSERVER_NAME = "zrpc-observer"
"""The name that the key of an observer must be allowed to claim, where workers have keys of their own."""


@message_type(60, idempotent=True)
@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Let me send to the workers of this group, and them to me. Observer to broker; answered with `Attached`."""

    group: str


@message_type(61, idempotent=True)
@dataclass(frozen=True, slots=True)
class Attached(Message):
    """The observer can send to the workers of the group. `members` as in `Welcome`; none: there is no such group.

    `world_size` 0: the group grows and shrinks. `phase`: for people.
    """

    members: list[Any]
    world_size: int
    phase: Line


@message_type(62, idempotent=True)
@dataclass(frozen=True, slots=True)
class Look(Message):
    """What do you see? Observer to worker; answered with `Seen`, to the observer, which listens at `address`.

    `what` is one of the questions of `zrpc.sight`, `about` says more.
    """

    what: str
    about: dict[str, Any]
    address: str


@message_type(63, idempotent=True)
@dataclass(frozen=True, slots=True)
class Seen(Message):
    """The answer to a `Look`, with its call id; several come for one that asks to be told of what happens."""

    seen: dict[str, Any]
