"""What the tables ask for: they decide, and whoever feeds them events carries this out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zrpc.errors import PeerLostError, RRefError

if TYPE_CHECKING:
    from zrpc.ids import Incarnation, RRefId
    from zrpc.wire.messages import RRefChildAccept, RRefCreationFailed, RRefForkRequest, RRefUserDelete


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to the life `to` of a worker, again and again until it is acknowledged or `to` is lost."""

    to: Incarnation
    message: RRefChildAccept | RRefCreationFailed | RRefForkRequest | RRefUserDelete


@dataclass(frozen=True, slots=True)
class AskOwner:
    """As `Tell`, and report the acknowledgement (`acknowledged`) or its failure (`failed`) for `message.fork_id`."""

    to: Incarnation
    message: RRefForkRequest


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody else uses the RRef `rref_id`: let go of its value, unless this worker itself holds on to it."""

    rref_id: RRefId


@dataclass(frozen=True, slots=True)
class Unmade:
    """The value of `rref_id` is not made yet, and may never be: tell all who wait for it, and forget them."""

    rref_id: RRefId

    def error(self) -> RRefError:
        """What they are told."""
        return RRefError(
            f"RRef creation via rpc.remote() failed: {self.rref_id} has no value. The call that was to make it did not "
            "come here within its time limit, or all who use the RRef are gone"
        )


@dataclass(frozen=True, slots=True)
class Orphan:
    """The RRef `rref_id` will never get a value, because its creator is gone: tell all who wait for it."""

    rref_id: RRefId

    def error(self) -> PeerLostError:
        """What they are told."""
        return PeerLostError(f"The worker {self.rref_id.created_on} died before it created {self.rref_id}")


Action = Tell | AskOwner | Release | Orphan | Unmade
