"""Sending without a socket: frames are copied as a network would copy them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.wire.envelope import INLINE_MAX_NBYTES, Buffer, decode, encode
from zrpc.wire.messages import Reply
from zrpc.wire.payload import Payload, open_payload, seal
from zrpc.wire.route import Route

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


def received(frames: Sequence[Buffer]) -> list[Buffer]:
    """What a transport hands on for these frames: small ones as bytes, large ones as writable views of new memory."""
    return [bytes(frame) if len(frame) <= INLINE_MAX_NBYTES else memoryview(bytearray(frame)) for frame in frames]


def sent(payload: Payload, devices: Mapping[str, str] | None = None) -> list[Buffer]:
    """The frames of `payload`."""
    return encode(seal(Reply(), 1, payload, None, Route(devices or {})))


def travel(payload: Payload, devices: Mapping[str, str] | None = None) -> Payload:
    """`payload` as it arrives."""
    return open_payload(decode(received(sent(payload, devices))))


def travel_tensors(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of one message as they arrive."""
    return travel(Payload(tensors=list(tensors))).tensors
