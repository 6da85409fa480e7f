"""What workers write of themselves into the store of their group. Pure.

A worker writes a `Record`. In a static group rank 0 makes a roster of all records, or somebody a `Failure` in its
place.

Failure: what cannot be read raises `RefusedError`, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack

from zrpc import remote_text
from zrpc.errors import ProtocolError, RefusedError
from zrpc.membership.members import member_of
from zrpc.wire import packed_bytes

if TYPE_CHECKING:
    from zrpc.membership.group import Member


@dataclass(frozen=True, slots=True)
class Record:
    """One worker.

    Attributes:
        member: it.
        world_size: with which it was started; 0: in a dynamic group.
        leader: the life of rank 0 that it has met, in hexadecimal digits: the record is no older than that life.
    """

    member: Member
    world_size: int
    leader: str = ""

    def pack(self) -> bytes:
        """The record as bytes."""
        info = self.member.info
        fields = [info.name, info.id, self.member.incarnation, self.member.card, self.world_size, self.leader]
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def unpack(cls, raw: bytes) -> Record:
        """What `pack` made `raw` of.

        Raises:
            RefusedError: it did not.
        """
        fields = _unpack(raw)
        if not isinstance(fields, list) or len(fields) != 6 or type(fields[4]) is not int or type(fields[5]) is not str:
            raise _unreadable("it has other fields")
        try:
            member = member_of(*fields[:4])
        except ProtocolError as error:
            raise _unreadable(str(error)) from error
        return cls(member, fields[4], fields[5])


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a static group cannot be.

    Attributes:
        why: for people.
        here: how many workers have come, and are to read this.
    """

    why: str
    here: int

    def pack(self) -> bytes:
        """The failure as bytes."""
        packed: bytes = msgpack.packb({"why": self.why, "here": self.here})
        return packed


def pack_roster(records: list[bytes]) -> bytes:
    """The roster of packed records."""
    packed: bytes = msgpack.packb(records)
    return packed


def unpack_roster(raw: bytes) -> list[bytes] | Failure:
    """What `pack_roster` or `Failure.pack` made `raw` of.

    Raises:
        RefusedError: neither did.
    """
    read = _unpack(raw)
    match read:
        case {"why": str(why), "here": int(here)}:
            return Failure(remote_text.lines(why), here)
        case list() if all(isinstance(record, bytes) for record in read):
            return read
    raise _unreadable("it is no roster")


def _unpack(raw: bytes) -> object:
    try:
        return packed_bytes.unpack(raw)
    except Exception as error:
        raise _unreadable(remote_text.line(str(error)) or type(error).__name__) from error


def _unreadable(why: str) -> RefusedError:
    return RefusedError(
        f"a record in the store of this group cannot be read ({why}): it was written by another version of zrpc, or by "
        "no worker. Use one version for all workers, and a store that only they can reach"
    )
