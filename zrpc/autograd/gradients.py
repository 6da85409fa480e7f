"""Gradients as a payload: a byte a gradient that says whether there is one, and the tensors.

Those for several send functions together have, packed, a `[created_on, local_id, bytes]` each.
"""

from __future__ import annotations

import reprlib
from collections import deque
from typing import TYPE_CHECKING

import msgpack
import torch

from zrpc.errors import ProtocolError
from zrpc.wire import packed_bytes
from zrpc.wire.envelope import INLINE_MAX_NBYTES
from zrpc.wire.messages import global_id
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.autograd.functions import Gradients
    from zrpc.ids import GlobalId


def pack(gradients: Gradients) -> Payload:
    """Take `gradients` apart. The tensors are not copied."""
    return Payload(_presence(gradients), _tensors(gradients))


def unpack(payload: Payload) -> Gradients:
    """Put them together again. The payload loses its tensors: a gradient that nobody else holds need not be copied.

    No two of them share memory, though their senders' may have (`x + y` has one gradient for both): who gets one may
    write to it.

    Raises:
        ProtocolError: there are fewer tensors than gradients, or more.
    """
    present = bytes(payload.data)
    return _fill(present, _take(_count(present), payload))


def pack_several(homeward: Sequence[tuple[GlobalId, Gradients]]) -> Payload | None:
    """Take gradients for several send functions apart; None if there are none. The tensors are not copied."""
    if not homeward:
        return None
    data = msgpack.packb([[*message_id, _presence(gradients)] for message_id, gradients in homeward])
    return Payload(data, [tensor for _, gradients in homeward for tensor in _tensors(gradients)])


def unpack_several(payload: Payload) -> list[tuple[GlobalId, Gradients]]:
    """Put them together again, as `unpack`.

    Raises:
        ProtocolError: they are damaged.
    """
    if len(payload.data) == 0:
        return []
    try:
        entries = packed_bytes.unpack(payload.data)
        several = [(global_id(message_id), present) for *message_id, present in entries]
    except Exception as error:
        raise ProtocolError(f"{reprlib.repr(bytes(payload.data))} does not say which gradients came") from error
    if not all([type(present) is bytes for _, present in several]):
        raise ProtocolError(f"{reprlib.repr(entries)} does not say which gradients came")
    tensors = _take(sum([_count(present) for _, present in several]), payload)
    return [(message_id, _fill(present, tensors)) for message_id, present in several]


def _presence(gradients: Gradients) -> bytes:
    return bytes([gradient is not None for gradient in gradients])


def _count(present: bytes) -> int:
    """How many there are."""
    return len(present) - present.count(0)


def _tensors(gradients: Gradients) -> list[torch.Tensor]:
    return [_plain(gradient) for gradient in gradients if gradient is not None]


def _plain(gradient: torch.Tensor) -> torch.Tensor:
    """A small gradient as contiguous memory: that of a `sum()` is one element, expanded, which takes longer to tell."""
    if gradient.layout is torch.strided and gradient.nbytes <= INLINE_MAX_NBYTES:
        return gradient.contiguous()
    return gradient


def _take(wanted: int, payload: Payload) -> deque[torch.Tensor]:
    if wanted != len(payload.tensors):
        raise ProtocolError(f"{len(payload.tensors)} tensors came for {wanted} gradients")
    tensors = deque(payload.tensors)
    payload.tensors = []
    if len(tensors) > 1:
        _part(tensors)
    return tensors


def _part(tensors: deque[torch.Tensor]) -> None:
    """Give those a copy that share their memory with an earlier one. Parts of sparse ones never come shared."""
    seen: set[int] = set()
    for index in range(len(tensors)):
        if tensors[index].layout is torch.strided:
            storage = tensors[index].untyped_storage()._cdata
            if storage in seen:
                tensors[index] = tensors[index].clone()
            seen.add(storage)


def _fill(present: bytes, tensors: deque[torch.Tensor]) -> Gradients:
    return [tensors.popleft() if there else None for there in present]
