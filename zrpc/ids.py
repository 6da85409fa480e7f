"""Who and what: worker infos, globally unique ids and worker incarnations."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any, NamedTuple, NoReturn

MAX_NAME_LENGTH = 128
_NAME = re.compile(r"^[A-Za-z0-9\-_:]+$")

Incarnation = bytes
"""One life of one worker: `INCARNATION_NBYTES` random bytes, fresh at every `init_rpc`; also its socket identity."""

INCARNATION_NBYTES = 8


def new_incarnation() -> Incarnation:
    """A fresh incarnation. The first byte is never zero: ZeroMQ keeps identities that begin with one to itself."""
    raw = os.urandom(INCARNATION_NBYTES)
    return raw if raw[0] else b"\x01" + raw[1:]


class WorkerInfo:
    """A worker's name and rank: what a call may be addressed to. Immutable.

    Args:
        name: 1 to 127 letters, digits, underscores, colons or dashes; unique in its group.
        id: the worker's rank, 0 or more; unique in its group.

    Raises:
        RuntimeError: the name has another character in it, is empty or is too long.
    """

    __slots__ = ("id", "name")
    name: str
    id: int

    def __init__(self, name: str, id: int) -> None:
        if not _NAME.fullmatch(name) or len(name) >= MAX_NAME_LENGTH:
            raise RuntimeError(
                f"Worker name must match {_NAME.pattern}, and must be non-empty and shorter than "
                f"{MAX_NAME_LENGTH} chars, but got {name!r}"
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "id", int(id))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a WorkerInfo cannot be changed: {name} is set by the group")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkerInfo) and self.id == other.id and self.name == other.name

    def __hash__(self) -> int:
        return hash((self.name, self.id))

    def __repr__(self) -> str:
        return f"WorkerInfo(id={self.id}, name={self.name})"

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerInfo, (self.name, self.id)


class GlobalId(NamedTuple):
    """An id that no other worker of the group gives out: its maker's rank and a counter kept by that maker."""

    created_on: int
    local_id: int

    def __repr__(self) -> str:
        return f"GloballyUniqueId(created_on={self.created_on}, local_id={self.local_id})"


RRefId = GlobalId
ForkId = GlobalId


class IdGenerator:
    """Gives out `GlobalId`s for one rank. `next` is atomic under the interpreter's lock: any thread may call it.

    Args:
        created_on: this worker's rank.
        first: the first counter. Where a rank can come back while others still hold ids of its earlier life, each life
            must begin elsewhere: see `first_id_of`.
    """

    def __init__(self, created_on: int, first: int = 0) -> None:
        self._created_on = created_on
        self._counter = itertools.count(first)

    def next(self) -> GlobalId:
        return GlobalId(self._created_on, next(self._counter))


def first_id_of(incarnation: Incarnation) -> int:
    """A first counter for that life, 2**32 ids away from those of nearly every other: its first 31 bits, shifted."""
    return (int.from_bytes(incarnation[:4], "big") >> 1) << 32
