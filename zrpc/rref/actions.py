"""What the tables ask for: they decide, and whoever feeds them events carries this out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.ids import Incarnation, RRefId
    from zrpc.wire.messages import RRefChildAccept, RRefForkRequest, RRefUserDelete


@dataclass(frozen=True, slots=True)
class Tell:
    """Send `message` to the life `to` of a worker, again and again until it is acknowledged or `to` is lost."""

    to: Incarnation
    message: RRefChildAccept | RRefForkRequest | RRefUserDelete


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
class Orphan:
    """The RRef `rref_id` will never get a value, because its creator is gone: tell all who wait for it."""

    rref_id: RRefId


Action = Tell | AskOwner | Release | Orphan
