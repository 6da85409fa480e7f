"""Tensors that device maps are about, with a device that is none (`tests.unit.staging.fake`)."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.unit.staging.fake import FakeAccelerator, on_device
from tests.unit.wire.travel import received
from zrpc.errors import DeviceError, ProtocolError, SerializationError
from zrpc.staging import handover
from zrpc.staging.stager import Staging
from zrpc.wire.envelope import Arriving, decode, encode
from zrpc.wire.messages import Reply
from zrpc.wire.payload import Payload, open_payload, seal
from zrpc.wire.route import Route

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.wire.envelope import Envelope


class Link:
    """Two workers' ends: what is sealed for the one is opened by the other."""

    def __init__(self, devices: dict[str, str]) -> None:
        self.there = FakeAccelerator(1)
        self.sender = self._staging(FakeAccelerator(0))
        self.receiver = self._staging(self.there)
        self.route = Route(devices, self.sender, "Request", "worker1")

    @staticmethod
    def _staging(accelerator: FakeAccelerator) -> Staging:
        made = Staging(lambda: accelerator, 1 << 20, lambda task: None, nullcontext)
        made.use(["cuda:0"])
        return made

    def seal(self, *tensors: torch.Tensor) -> Envelope:
        return seal(Reply(), 1, Payload(tensors=list(tensors)), None, self.route)

    def open(self, envelope: Envelope) -> list[torch.Tensor]:
        tensors = open_payload(decode(received(encode(envelope))), self.receiver).tensors
        self.there.finish()
        return tensors

    def travel(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return self.open(self.seal(*tensors))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    handover.order_by(None)


def is_placed(entry: list[object], device: str = "cuda:0") -> bool:
    return entry[:2] == [6, device]


DENSE = torch.randn(30, 50)
TENSORS = {
    "dense": DENSE,
    "small": torch.arange(3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "transposed": DENSE.t(),
    "sliced": DENSE[3:7],
    "column": torch.randn(3000, 40)[:, 3],
    "expanded": torch.randn(5, 1).expand(5, 4),
    "conjugate": torch.randn(4, 4, dtype=torch.complex64).conj(),
    "negative": torch._neg_view(torch.randn(4)),
    "bfloat16": torch.randn(7, 3).bfloat16(),
    "leaf": torch.randn(200, 30).requires_grad_(),
    "large": torch.randn(1 << 20),
}


@pytest.mark.parametrize("name", sorted(TENSORS))
@pytest.mark.parametrize("from_cpu", [False, True])
def test_they_arrive_as_they_were(name: str, from_cpu: bool) -> None:
    tensor = TENSORS[name]
    link = Link({"cpu": "cuda:0"} if from_cpu else {"cuda:0": "cuda:0"})
    envelope = link.seal(tensor if from_cpu else on_device(tensor))
    assert is_placed(envelope.table[0])
    assert envelope.is_arriving == (not from_cpu and tensor.numel() > 0)
    (after,) = link.open(envelope)
    assert type(after) is torch.Tensor
    assert (after.dtype, after.shape, after.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert (after.is_conj(), after.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    assert torch.equal(after, tensor)


def test_a_received_buffer_is_held_until_its_device_has_copied_it_and_no_longer() -> None:
    """Its memory is free again while the request that it came with is served."""
    link = Link({"cuda:0": "cuda:0"})
    envelope = decode(received(encode(link.seal(on_device(DENSE.repeat(20, 1))))))
    memory = np.frombuffer(envelope.buffers[0], np.uint8).copy()
    envelope.buffers = [memory.data]
    held = weakref.ref(memory)
    del memory
    payload = open_payload(envelope, link.receiver)
    del envelope
    assert held() is not None
    link.receiver.drain()
    assert held() is None
    link.there.finish()
    assert torch.equal(payload.tensors[0], DENSE.repeat(20, 1))


def test_what_arrives_on_the_cpu_is_not_placed() -> None:
    link = Link({"cuda:0": "cpu"})
    envelope = link.seal(on_device(DENSE), DENSE.clone())
    assert [entry[0] for entry in envelope.table] == [0, 0]
    for after in link.open(envelope):
        assert torch.equal(after, DENSE)


def test_tensors_of_the_cpu_stay_there_unless_the_map_says_otherwise() -> None:
    envelope = Link({"cuda:0": "cuda:1"}).seal(DENSE, on_device(DENSE.clone()), torch.empty(3, device="meta"))
    plain, placed, meta = envelope.table
    assert plain[0] == 0
    assert is_placed(placed, "cuda:1")
    assert meta[0] == 5


@pytest.mark.parametrize("from_cpu", [False, True])
def test_views_of_one_storage_arrive_as_views_of_one(from_cpu: bool) -> None:
    link = Link({"cpu": "cuda:0"} if from_cpu else {"cuda:0": "cuda:0"})
    tensors = [DENSE[:10], DENSE.t(), torch.randn(3)]
    envelope = link.seal(*(tensors if from_cpu else map(on_device, tensors)))
    assert len(envelope.buffers) == 2
    after = link.open(envelope)
    assert all(torch.equal(one, other) for one, other in zip(after, tensors, strict=True))
    after[0].zero_()
    assert not after[1][:, :10].any()
    assert after[1][:, 10:].equal(DENSE.t()[:, 10:])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_of_sparse_tensors_each_part_is_placed() -> None:
    sparse = torch.eye(4).to_sparse()
    link = Link({"cpu": "cuda:0"})
    envelope = link.seal(sparse, torch.eye(3).to_sparse_csr())
    coo, csr = envelope.table
    assert coo[0] == 2
    assert all(map(is_placed, coo[-2:]))
    assert all(map(is_placed, csr[-3:]))
    after, other = link.open(envelope)
    assert torch.equal(after.to_dense(), torch.eye(4))
    assert torch.equal(other.to_dense(), torch.eye(3))


def test_what_is_not_mapped_is_refused_in_words_that_torch_has_too() -> None:
    wanted = "RPC backend only supports CPU tensors by default.*`set_device_map` on `TensorPipeRpcBackendOptions`"
    with pytest.raises(SerializationError, match=wanted):
        seal(Reply(), 1, Payload(tensors=[on_device(DENSE)]), None)
    answer = Route({"cuda:1": "cuda:0"}, None, "Response", "worker3")
    with pytest.raises(
        SerializationError, match="Response device mapping is not available for destination worker3, device cuda:0"
    ):
        seal(Reply(), 1, Payload(tensors=[on_device(DENSE)]), None, answer)


def test_what_cannot_be_placed_is_refused() -> None:
    link = Link({"cpu": "cuda:7"})
    with pytest.raises(DeviceError, match="cuda:7"):
        link.travel(DENSE)
    envelope = link.seal(DENSE)
    with pytest.raises(ProtocolError, match="a tensor for cuda:7 came, and this worker uses no such device"):
        open_payload(decode(received(encode(envelope))))
    damaged = link.seal(DENSE)
    damaged.table[0][2] = [2, [1], False, False, 0, [], []]  # type: ignore[index]
    with pytest.raises(ProtocolError, match="placed as a whole"):
        link.open(damaged)


class InPieces(Arriving):
    def __init__(self, *pieces: bytes) -> None:
        self.nbytes = sum(map(len, pieces))
        self._pieces = pieces

    def pieces(self) -> Iterator[memoryview]:
        yield from map(memoryview, self._pieces)


@pytest.mark.parametrize("pieces", [(b"abc",), (b"ab", b"c"), (b"x" * 3000, b"y" * 3000)])
def test_a_buffer_that_arrives_in_pieces_is_sent_whole(pieces: tuple[bytes, ...]) -> None:
    envelope = seal(Reply(), 1, Payload(b"data", buffers=()), None)
    envelope.buffers = [InPieces(*pieces)]
    assert decode(received(encode(envelope))).buffers == [b"".join(pieces)]
