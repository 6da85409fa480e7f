"""What of an RRef travels."""

from __future__ import annotations

import reprlib
import struct
from typing import NamedTuple

from zrpc.errors import ProtocolError
from zrpc.ids import INCARNATION_NBYTES, ForkId, GlobalId, Incarnation, RRefId

_PACKED = struct.Struct(f"<i{INCARNATION_NBYTES}siq{INCARNATION_NBYTES}siq{INCARNATION_NBYTES}s")
_NUM_FIELDS = 7


class ForkData(NamedTuple):
    """One fork on its way. Whoever hands it out made its id, which therefore says who that is.

    Attributes:
        owner: the owner's rank, for people.
        owner_life: the owner's incarnation.
        rref_id: the RRef.
        fork_id: the fork.
    """

    owner: int
    owner_life: Incarnation
    rref_id: RRefId
    fork_id: ForkId

    @property
    def parent(self) -> Incarnation:
        """The life that handed it out."""
        return self.fork_id.life

    def pack(self) -> bytes:
        """As bytes; a pickle stream that holds the fork holds exactly these."""
        return _PACKED.pack(self.owner, self.owner_life, *self.rref_id, *self.fork_id)

    @classmethod
    def unpack(cls, packed: bytes) -> ForkData:
        """The fork that `pack` packed.

        Raises:
            ProtocolError: `packed` is something else.
        """
        if not isinstance(packed, bytes) or len(packed) != _PACKED.size:
            raise ProtocolError(f"{reprlib.repr(packed)} is not a pickled RRef")
        owner, owner_life, *ids = _PACKED.unpack(packed)
        return cls(owner, owner_life, GlobalId(*ids[:3]), GlobalId(*ids[3:]))

    def as_tuple(self) -> tuple[int, int, int, int, int, int, bytes]:
        """As torch lays it out, for `RRef._serialize`; in the place of the type comes `pack`."""
        rref, fork = self.rref_id, self.fork_id
        ids = rref.created_on, rref.local_id, fork.created_on, fork.local_id
        return self.owner, *ids, fork.created_on, self.pack()

    @classmethod
    def from_tuple(cls, fields: tuple[int, int, int, int, int, int, bytes]) -> ForkData:
        """The fork that `as_tuple` laid out.

        Raises:
            ProtocolError: `fields` is something else.
        """
        if not isinstance(fields, tuple | list) or len(fields) != _NUM_FIELDS:
            raise ProtocolError(f"{reprlib.repr(fields)} is not a serialized RRef")
        return cls.unpack(fields[-1])
