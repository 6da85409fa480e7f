"""Gradients as payloads: what comes out is what went in, and what is damaged is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack
import pytest
import torch

from zrpc.autograd import gradients as codec
from zrpc.errors import ProtocolError
from zrpc.ids import GlobalId
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGE = torch.ones(()).expand(1 << 20)
"""One element, seen often, as the gradient of a `sum()` is."""


def check_same(came: codec.Gradients, sent: codec.Gradients) -> None:
    assert [gradient is None for gradient in came] == [gradient is None for gradient in sent]
    for mine, its in zip(came, sent, strict=True):
        if mine is not None:
            assert torch.equal(mine.to_dense(), its.to_dense())


@pytest.mark.parametrize("sent", [(), (None,), (torch.ones(3), None, torch.zeros(2, 2)), (LARGE,)])
def test_gradients_come_as_they_went(sent: codec.Gradients) -> None:
    payload = codec.pack(sent)
    check_same(codec.unpack(payload), sent)
    assert payload.tensors == [], "nobody else holds them"


def check_apart(came: Sequence[torch.Tensor | None]) -> None:
    """What is written to one shows in no other."""
    strided = [gradient for gradient in came if gradient is not None and gradient.layout is torch.strided]
    for number, gradient in enumerate(strided):
        gradient.fill_(number)
    assert [set(gradient.flatten().tolist()) for gradient in strided] == [{number} for number in range(len(strided))]


def test_no_two_gradients_share_memory() -> None:
    one, large = torch.arange(8.0), torch.ones(100_000)
    sparse = torch.eye(2).to_sparse()
    sent = [one, None, one, one[2:], sparse, one.view(2, 4), one.expand(2, 8), large, torch.zeros(3), large[1:]]
    expected = [None if gradient is None else gradient.clone() for gradient in sent]
    came = codec.unpack(codec.pack(sent))
    check_same(came, expected)
    check_apart(came)


def test_nor_do_those_for_several_send_functions() -> None:
    one = torch.arange(8.0)
    packed = codec.pack_several([(GlobalId(0, 1), [one, one]), (GlobalId(0, 2), [None, one])])
    assert packed is not None
    came = [gradient for _, gradients in codec.unpack_several(packed) for gradient in gradients]
    check_same(came, [torch.arange(8.0), torch.arange(8.0), None, torch.arange(8.0)])
    check_apart(came)


def test_a_small_expanded_gradient_travels_as_contiguous_memory_and_a_large_one_as_it_is() -> None:
    assert codec.pack([torch.ones(()).expand(4)]).tensors[0].stride() == (1,)
    assert codec.pack([LARGE]).tensors[0] is LARGE


def test_gradients_for_several_send_functions_come_as_they_went() -> None:
    sent = [(GlobalId(3, 1), (torch.ones(3), None)), (GlobalId(3, 1 << 60), ()), (GlobalId(0, 2), (torch.zeros(1),))]
    packed = codec.pack_several(sent)
    assert packed is not None
    came = codec.unpack_several(packed)
    assert [message_id for message_id, _ in came] == [message_id for message_id, _ in sent]
    for (_, mine), (_, its) in zip(came, sent, strict=True):
        check_same(mine, its)


def test_no_gradients_are_no_payload() -> None:
    assert codec.pack_several([]) is None
    assert codec.unpack_several(Payload()) == []


@pytest.mark.parametrize(("present", "count"), [(b"\1", 0), (b"\1\1", 1), (b"\0", 1), (b"", 1)])
def test_another_number_of_tensors_is_refused(present: bytes, count: int) -> None:
    tensors = [torch.ones(1)] * count
    with pytest.raises(ProtocolError, match="tensors came for"):
        codec.unpack(Payload(present, list(tensors)))
    with pytest.raises(ProtocolError, match="tensors came for"):
        codec.unpack_several(Payload(msgpack.packb([[0, 1, b"", present]]), list(tensors)))


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        msgpack.packb(7),
        msgpack.packb([[0, 1]]),
        msgpack.packb([[0, 1, 1 << 40]]),
        msgpack.packb([[0, 1, "text"]]),
        msgpack.packb([[0, "x", b""]]),
        msgpack.packb([[0, 1, b"", 2]]),
        msgpack.packb([[0, 1, b"\0"]])[:-1],
    ],
)
def test_what_does_not_say_which_gradients_came_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not say which gradients came"):
        codec.unpack_several(Payload(data))
