"""Gradients as a payload: a byte a gradient that says whether there is one, and the tensors.

Those for several send functions together have, packed, a `[created_on, local_id, bytes]` each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.errors import ProtocolError
from zrpc.ids import GlobalId
from zrpc.wire import values
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from zrpc.autograd.functions import Gradients


def pack(gradients: Gradients) -> Payload:
    """Take `gradients` apart. The tensors are not copied."""
    return Payload(_presence(gradients), _tensors(gradients))


def unpack(payload: Payload) -> Gradients:
    """Put them together again.

    Raises:
        ProtocolError: there are fewer tensors than gradients, or more.
    """
    present = bytes(payload.data)
    _check(sum(map(bool, present)), payload)
    return _fill(present, iter(payload.tensors))


def pack_several(homeward: Sequence[tuple[GlobalId, Gradients]]) -> Payload | None:
    """Take gradients for several send functions apart; None if there are none. The tensors are not copied."""
    if not homeward:
        return None
    packed = values.pack([[*message_id, _presence(gradients)] for message_id, gradients in homeward])
    return Payload(packed.data, [tensor for _, gradients in homeward for tensor in _tensors(gradients)])


def unpack_several(payload: Payload) -> list[tuple[GlobalId, Gradients]]:
    """Put them together again.

    Raises:
        ProtocolError: they are damaged.
    """
    if len(payload.data) == 0:
        return []
    entries = values.unpack(payload)
    try:
        several = [(GlobalId(int(created_on), int(local_id)), bytes(present)) for created_on, local_id, present in entries]
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{entries!r} does not say which gradients came") from error
    _check(sum(sum(map(bool, present)) for _, present in several), payload)
    tensors = iter(payload.tensors)
    return [(message_id, _fill(present, tensors)) for message_id, present in several]


def _presence(gradients: Gradients) -> bytes:
    return bytes(gradient is not None for gradient in gradients)


def _tensors(gradients: Gradients) -> list[torch.Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def _check(wanted: int, payload: Payload) -> None:
    if wanted != len(payload.tensors):
        raise ProtocolError(f"{len(payload.tensors)} tensors came for {wanted} gradients")


def _fill(present: bytes, tensors: Iterator[torch.Tensor]) -> Gradients:
    return [next(tensors) if there else None for there in present]
