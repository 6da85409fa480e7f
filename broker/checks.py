"""What a worker says of itself when it comes, or comes back: whether that can be, whatever the group. Pure."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

from zrpc.ids import WorkerInfo
from zrpc_broker.runs import RUN_NBYTES, UNGIVEN

if TYPE_CHECKING:
    from zrpc.wire.messages import Register
    from zrpc.wire.rejoining import Rejoin

GROUP_MAX_LENGTH = 256


def malformed_return(said: Rejoin) -> str | None:
    """What is wrong with a return beside what is with a registration."""
    if said.rank == UNGIVEN or type(said.run) is not bytes or len(said.run) != RUN_NBYTES:
        return f"{reprlib.repr(said.run)} stands for no run: install the same zrpc on workers and broker"
    return None


def malformed(wanted: Register | Rejoin) -> str | None:
    """What is wrong with a registration whatever the group."""
    values: list[object] = [wanted.name, wanted.rank, wanted.world_size, wanted.card, wanted.group]
    if [type(value) for value in values] != [str, int, int, dict, str]:
        return f"{reprlib.repr(wanted)} is malformed: install the same zrpc on workers and broker"
    if len(wanted.group) > GROUP_MAX_LENGTH:
        return (
            f"the name of a group has {len(wanted.group)} characters, and may have {GROUP_MAX_LENGTH}: choose another"
        )
    try:
        WorkerInfo(wanted.name, wanted.rank)
    except RuntimeError as error:
        return str(error)
    if wanted.world_size < 0:
        return f"world_size is {wanted.world_size}: it must be 1 or more, or none for a group that grows and shrinks"
    if wanted.rank < UNGIVEN or (wanted.world_size and wanted.rank >= wanted.world_size):
        wish = f"from 0 to {wanted.world_size - 1} (world_size - 1)" if wanted.world_size else "0 or more"
        return f"rank {wanted.rank} of {wanted.name!r} is out of range: it must be {wish}, or -1 to be given one"
    return None
