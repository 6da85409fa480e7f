"""Members as others tell of them: in a store, and in the broker's messages.

What: who a worker is and what it says of itself (its card). Failure: a record that others wrote and that is none is a
`ProtocolError` which says what is wrong with it. Threads: any.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from zrpc import remote_text
from zrpc.errors import ProtocolError
from zrpc.ids import INCARNATION_NBYTES, WorkerInfo
from zrpc.membership.group import Member

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL_MAX_S = 86_400.0
_RANK_END = 1 << 31
_FIELDS = (str, int, bytes, dict)


def member_of(name: object, rank: object, incarnation: object, card: object) -> Member:
    """The member of whom a record says this.

    Raises:
        ProtocolError: there can be no such member.
    """
    fields: Any = (name, rank, incarnation, card)
    if tuple(map(type, fields)) != _FIELDS or len(fields[2]) != INCARNATION_NBYTES or not 0 <= fields[1] < _RANK_END:
        raise ProtocolError(f"{reprlib.repr(fields)} is no record of a worker")
    _check_card(fields[3])
    try:
        return Member(WorkerInfo(fields[0], fields[1]), fields[2], fields[3])
    except RuntimeError as error:
        raise ProtocolError(f"a record has no name of a worker: {remote_text.line(str(error))}") from error


def members_of(entries: list[Any]) -> list[Member]:
    """The members of a `Welcome`.

    Raises:
        ProtocolError: one of them cannot be.
    """
    members = []
    for entry in entries:
        if type(entry) is not list or len(entry) != 4:
            raise ProtocolError(f"{reprlib.repr(entry)} is no record of a worker")
        incarnation, name, rank, card = entry
        members.append(member_of(name, rank, incarnation, card))
    return members


def _is_text(value: object) -> bool:
    return type(value) is str


def _are_texts(value: object) -> bool:
    return type(value) is list and all([type(one) is str for one in value])


def _is_map(value: object) -> bool:
    return type(value) is dict and all([type(part) is str for pair in value.items() for part in pair])


def _are_maps(value: object) -> bool:
    return type(value) is dict and all([type(name) is str and _is_map(one) for name, one in value.items()])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 16


def _is_pid(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 32


_CARD: dict[str, Callable[[object], bool]] = {
    "address": _is_text,
    "host": _is_text,
    "pid": _is_pid,
    "devices": _are_texts,
    "device_count": _is_count,
    "device_maps": _are_maps,
}
"""What is read of a card; other entries are of later versions."""


def _check_card(card: dict[str, Any]) -> None:
    for key, is_right in _CARD.items():
        if card.get(key) is not None and not is_right(card[key]):
            raise ProtocolError(f"the card of a worker says {reprlib.repr(card[key])} of {key}")


def interval_s(value: float) -> float:
    """An interval in seconds that a broker asks for.

    Raises:
        ProtocolError: it is none.
    """
    if not 0 < value <= INTERVAL_MAX_S:  # nor is NaN
        raise ProtocolError(f"the broker wants heartbeats every {value} s")
    return value
