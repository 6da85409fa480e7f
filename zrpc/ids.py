"""Who and what: worker infos, globally unique ids and worker incarnations."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any, NamedTuple, NoReturn

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"^[A-Za-z0-9\-_:]+$")

Incarnation = bytes
"""One life of one worker: `INCARNATION_NBYTES` bytes, fresh at every `init_rpc`; also its socket identity. They are
random, but for the last ones of a worker with a key of its own: those are the key's fingerprint (`zrpc.keyring`)."""

INCARNATION_NBYTES = 8


def new_incarnation(end: bytes = b"") -> Incarnation:
    """A fresh incarnation. The first byte is never zero: ZeroMQ keeps identities that begin with one to itself.

    Args:
        end: its last bytes; the others are random.
    """
    raw = os.urandom(INCARNATION_NBYTES - len(end)) + end
    return raw if raw[0] else b"\x01" + raw[1:]


class WorkerInfo:
    """A worker's name and rank: what a call may be addressed to. Immutable.

    One that the group gave out also knows which life of the worker it names. That is no part of its value: two infos
    are equal if name and rank are.

    Args:
        name: 1 to 127 letters, digits, underscores, colons or dashes; unique in its group.
        id: the worker's rank, 0 or more; unique in its group.
        incarnation: the life of the worker; empty: whichever has the rank when it is called.

    Raises:
        RuntimeError: the name has another character in it, is empty or is too long.
    """

    __slots__ = ("id", "incarnation", "name")
    name: str
    id: int
    incarnation: Incarnation

    def __init__(self, name: str, id: int, incarnation: Incarnation = b"") -> None:
        if not _NAME.fullmatch(name) or len(name) >= MAX_NAME_LENGTH:
            raise RuntimeError(
                f"Worker name must match {_NAME.pattern}, and must be non-empty and shorter than "
                f"{MAX_NAME_LENGTH} chars, but got {name!r}"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "id", int(id))
        object.__setattr__(self, "incarnation", incarnation)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a WorkerInfo cannot be changed: {name} is set by the group")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkerInfo) and self.id == other.id and self.name == other.name

    def __hash__(self) -> int:
        return hash((self.name, self.id))

    def __repr__(self) -> str:
        return f"WorkerInfo(id={self.id}, name={self.name})"

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerInfo, (self.name, self.id, self.incarnation)


class GlobalId(NamedTuple):
    """An id that no other worker of the group gives out, nor another life of its maker.

    Attributes:
        created_on: its maker's rank, for people.
        local_id: a counter kept by the maker.
        life: the maker's incarnation.
    """

    created_on: int
    local_id: int
    life: Incarnation = b""

    def __repr__(self) -> str:
        return f"GloballyUniqueId(created_on={self.created_on}, local_id={self.local_id})"


RRefId = GlobalId
ForkId = GlobalId


class IdGenerator:
    """Gives out the `GlobalId`s of one life. `next` is atomic under the interpreter's lock: any thread may call it.

    Args:
        created_on: this worker's rank.
        life: this worker's incarnation.
    """

    def __init__(self, created_on: int, life: Incarnation = b"") -> None:
        self._created_on = created_on
        self._life = life
        self._counter = itertools.count()

    def next(self) -> GlobalId:
        return GlobalId(self._created_on, next(self._counter), self._life)


ENDED_MAX = 4096
"""So many lives that are over stay known: what comes late of one of them comes long before that many others end."""


class EndedLives(dict[Incarnation, str]):
    """Why each of the last lives that are over has ended. The oldest is forgotten where there are more than the limit.

    Whoever changes it guards it with a lock; it may be read without.

    Args:
        limit: how many stay known.
    """

    def __init__(self, limit: int = ENDED_MAX) -> None:
        super().__init__()
        self._limit = limit

    def note(self, life: Incarnation, reason: str) -> bool:
        """`life` is over; false if that was known. The first reason stays."""
        if life in self:
            return False
        self[life] = reason
        if len(self) > self._limit:
            del self[next(iter(self))]
        return True
