"""Gradients as a payload: a byte a gradient that says whether there is one, and the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.errors import ProtocolError
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from zrpc.autograd.functions import Gradients


def pack(gradients: Gradients) -> Payload:
    """Take `gradients` apart. The tensors are not copied."""
    present = bytes(gradient is not None for gradient in gradients)
    return Payload(present, [gradient for gradient in gradients if gradient is not None])


def unpack(payload: Payload) -> Gradients:
    """Put them together again.

    Raises:
        ProtocolError: there are fewer tensors than gradients.
    """
    present = bytes(payload.data)
    if sum(map(bool, present)) != len(payload.tensors):
        raise ProtocolError(f"{len(payload.tensors)} tensors came for gradients {present!r}")
    tensors = iter(payload.tensors)
    return [next(tensors) if there else None for there in present]
