"""What of an RRef travels."""

from __future__ import annotations

import struct
from typing import NamedTuple

from zrpc.errors import ProtocolError
from zrpc.ids import ForkId, GlobalId, RRefId

_PACKED = struct.Struct("<iiqiqi")
_NUM_FIELDS = 7


class ForkData(NamedTuple):
    """One fork on its way: the ranks of the owner and of the sender, and the ids of the RRef and of the fork."""

    owner: int
    rref_id: RRefId
    fork_id: ForkId
    parent: int

    def pack(self) -> bytes:
        """As bytes; a pickle stream that holds the fork holds exactly these."""
        return _PACKED.pack(self.owner, *self.rref_id, *self.fork_id, self.parent)

    @classmethod
    def unpack(cls, packed: bytes) -> ForkData:
        """The fork that `pack` packed.

        Raises:
            ProtocolError: `packed` is something else.
        """
        if not isinstance(packed, bytes) or len(packed) != _PACKED.size:
            raise ProtocolError(f"{packed!r} is not a pickled RRef")
        owner, rref_on, rref_local, fork_on, fork_local, parent = _PACKED.unpack(packed)
        return cls(owner, GlobalId(rref_on, rref_local), GlobalId(fork_on, fork_local), parent)

    def as_tuple(self) -> tuple[int, int, int, int, int, int, bytes]:
        """As torch lays it out, for `RRef._serialize`; in the place of the type comes `pack`."""
        return self.owner, *self.rref_id, *self.fork_id, self.parent, self.pack()

    @classmethod
    def from_tuple(cls, fields: tuple[int, int, int, int, int, int, bytes]) -> ForkData:
        """The fork that `as_tuple` laid out.

        Raises:
            ProtocolError: `fields` is something else.
        """
        if not isinstance(fields, tuple | list) or len(fields) != _NUM_FIELDS:
            raise ProtocolError(f"{fields!r} is not a serialized RRef")
        return cls.unpack(fields[-1])
