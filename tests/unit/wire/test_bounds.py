"""A table of tensors cannot make torch see, or take, more memory than came."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
import torch

from zrpc.errors import ProtocolError
from zrpc.wire import region, values
from zrpc.wire.envelope import decode, unpack_table
from zrpc.wire.messages import PROTOCOL_VERSION
from zrpc.wire.payload import Payload
from zrpc.wire.received import unpack
from zrpc.wire.tensors import COMPRESSED, COO, DENSE, META, NESTED, PLACED, QUANTIZED, STRIDED

pytestmark = pytest.mark.filterwarnings("ignore")

HUGE = 1 << 40


def dense(dtype: str, shape: list[Any], buffer: int) -> list[Any]:
    return [DENSE, dtype, shape, False, buffer]


def strided(shape: list[Any], strides: list[Any], offset: Any = 0, buffer: int = 0) -> list[Any]:
    return [STRIDED, "float32", shape, False, buffer, strides, offset, False, False]


def refused(entry: list[Any], *buffers: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        unpack([entry], list(buffers))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (dense("float32", [HUGE], -1), "no memory came"),
        (dense("float32", [HUGE, 0, 1 << 62], -1), "too many elements"),
        (dense("float32", [3, 3], 0), "16 bytes came for a tensor of 36"),
        (dense("float32", [HUGE], 0), "16 bytes came"),
        (dense("float32", [-2, -2], 0), "tensor table"),
        (strided([HUGE], [1]), "its memory has 4"),
        (strided([2, 2], [2, HUGE]), "its memory has 4"),
        (strided([4], [1], 1), "sees 5 elements"),
        (strided([4], [-1], 3), "strides"),
        (strided([4], [1], -1), "offset -1"),
        (strided([1], [1], buffer=-1), "its memory has 0"),
        (strided([HUGE], [1], buffer=-1), "its memory has 0"),
        (strided([HUGE, HUGE], [0, 0]), "too many elements"),
        (strided([1], [1 << 63]), "strides"),
        (strided([2.0], [1]), "not the shape"),
        (strided([2], [True]), "not the strides"),
        (strided([2, 2], [1]), "no view"),
        (strided([1], [1]), "16 bytes came for a tensor of 4"),
        ([META, "float32", [HUGE, HUGE], False, [1, 1], False, False], "too many elements"),
        ([META, "float32", [2], False, [-1], False, False], "strides"),
    ],
)
def test_a_tensor_lies_in_the_memory_that_came(entry: list[Any], words: str) -> None:
    """Sizes, strides and offsets that lead out of it, are negative, or cannot be counted with, are refused."""
    refused(entry, bytes(16), words=words)


def test_each_buffer_makes_one_tensor_of_its_own() -> None:
    """Else a short table could make much memory of a little: views of one storage say that they are views."""
    table = [dense("float32", [4], 0), dense("float32", [4], 0)]
    with pytest.raises(ProtocolError, match="theirs alone"):
        unpack(table, [bytes(16)])
    first, second = unpack([strided([4], [1]), strided([2], [1], 2)], [bytes(16)])
    first.fill_(1)
    assert torch.equal(second, torch.ones(2))


INDICES = (5).to_bytes(8, "little") + (0).to_bytes(8, "little")
TWO = torch.ones(2).numpy().tobytes()


@pytest.mark.parametrize(
    ("shape", "coalesced", "words"),
    [
        ([3], False, "size is inconsistent"),
        ([6], True, "coalesced"),
        ([6, 1], False, "sparse_dim"),
        ([-1], False, "shape"),
    ],
)
def test_indices_of_sparse_tensors_are_looked_at(shape: list[int], coalesced: bool, words: str) -> None:
    entry = [COO, shape, False, coalesced, 0, dense("int64", [1, 2], 0), dense("float32", [2], 1)]
    refused(entry, INDICES, TWO, words=words)


def test_sparse_tensors_within_their_bounds_arrive() -> None:
    entry = [COO, [6], False, False, 0, dense("int64", [1, 2], 0), dense("float32", [2], 1)]
    (tensor,) = unpack([entry], [INDICES, TWO])
    assert torch.equal(tensor.to_dense(), torch.tensor([1.0, 0, 0, 0, 0, 1]))


def test_indices_of_compressed_tensors_are_looked_at() -> None:
    rows = torch.tensor([0, 2, 2]).numpy().tobytes()
    parts = [dense("int64", [3], 0), dense("int64", [2], 1), dense("float32", [2], 2)]
    refused([COMPRESSED, "torch.sparse_csr", [2, 3], False, *parts], rows, INDICES, TWO, words="tensor table")


def test_quantized_tensors_have_the_sizes_of_their_integers() -> None:
    """torch would make memory of the sizes, or see past the integers."""
    for dtype, shape in (("qint8", [5]), ("qint8", [HUGE]), ("quint4x2", [HUGE]), ("quint2x4", [4, 40])):
        integers = dense("int8" if dtype == "qint8" else "uint8", [4], 0)
        refused([QUANTIZED, dtype, shape, "tensor", 1.0, 0, 0, integers], bytes(4), words="tensor")
    channels = [dense("float64", [2], 1), dense("int64", [2], 2)]
    for axis in (0, 1, -1, HUGE):
        entry = [QUANTIZED, "qint8", [4], "channel", *channels, axis, dense("int8", [4], 0)]
        refused(entry, bytes(4), bytes(16), bytes(16), words="quantized")


@pytest.mark.parametrize(
    "values_entry", [strided([4], [0]), strided([4], [2]), [META, "float32", [4], False, [1], False, False]]
)
def test_nested_tensors_lie_in_one_row_of_memory(values_entry: list[Any]) -> None:
    """Of which each element is there: one that is there once and says that it is there often is not enough."""
    refused([NESTED, False, values_entry, [[4]], [[1]], [0]], bytes(28), words="tensor")


def test_parts_of_tensors_are_plain() -> None:
    """A sparse tensor is not made of sparse ones, and so on without end."""
    inner = dense("float32", [4], 0)
    for entry in ([COO, [4], False, False, 0, inner, inner], [NESTED, False, inner, [], [], []]):
        for whole in ([PLACED, "cpu", entry], [NESTED, False, entry, [[1]], [[1]], [0]]):
            refused(whole, bytes(16), words="an entry of kind")


# ---- regions, headers, values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [[[2, 0, 8], [2, 0, 8]], [[2, 0, 8], [2, 7, 8]], [[3, 0, 4], [2, 0, 4]]])
def test_members_lie_one_behind_the_other(members: list[Any]) -> None:
    """Else a thousand of them could be the same 128 KiB, and each makes a tensor of its own."""
    buffers = [*members, bytes(64), bytes(64)]
    with pytest.raises(ProtocolError, match="behind the one before"):
        region.cut(buffers, [0, 1], [], True)


def test_packed_buffers_and_members_cannot_be_each_others_regions() -> None:
    """With memory that cannot be opened beside them, either: whatever is named, it is a ProtocolError."""

    def fetch(_: list[Any]) -> bytes:
        raise ProtocolError("not there")

    for buffers in ([[9, 9], None, [5, 0, 1], b"\x01\x00"], [None, [1], [3, 0, 1], b"\x01\x00"], [None, b"\x01\x00"]):
        header = msgpack.packb([PROTOCOL_VERSION, 10, 1, [], None, [], buffers, b""])
        with pytest.raises(ProtocolError):
            decode([header], fetch)


@pytest.mark.parametrize("claim", [b"\xdd\x00\x00\x10\x00", b"\xdc\x0f\xff"])
@pytest.mark.parametrize(
    "read", [lambda raw: decode([raw]), unpack_table, lambda raw: values.unpack(Payload(values.VALUES + raw))]
)
def test_arrays_that_claim_much_take_little(read: Any, claim: bytes) -> None:
    """Arrays within each other, each of which says that it has as many elements as there are bytes."""
    raw = claim * 1000
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            read(raw)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(raw) + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [95, 96, 97, 100_000])
def test_arrays_of_every_length_are_read(length: int) -> None:
    """Those that are longer than is taken at once are looked through first."""
    assert values.unpack(values.pack([*range(length)])) == [*range(length)]
    assert unpack_table(msgpack.packb([[index] for index in range(length)])) == [[index] for index in range(length)]


def test_tuples_lie_in_each_other_only_so_deep() -> None:
    """Each takes a piece of the stack of the thread that reads: sender and receiver have the same limit."""
    value: Any = 1
    for _ in range(values.MAX_DEPTH):
        value = (value,)
    assert values.unpack(values.pack(value)) == value
    with pytest.raises(values.UnpackableError):
        values.pack((value,))
    inner = bytes(values.pack([value]).data)[len(values.VALUES) :]
    raw = values.VALUES + msgpack.packb(msgpack.ExtType(1, inner))
    with pytest.raises(ProtocolError, match="deep"):
        values.unpack(Payload(raw))


@pytest.mark.parametrize("name", ["compile", "_dynamo", "load", "Tensor", "", "x" * 10_000])
def test_constants_of_torch_are_dtypes_layouts_and_memory_formats_alone(name: str) -> None:
    """Nothing else of torch is looked up, which may import modules; what is refused is told of in a few words."""
    raw = values.VALUES + msgpack.packb(msgpack.ExtType(3, name.encode()))
    with pytest.raises(ProtocolError, match="is not a dtype") as refusal:
        values.unpack(Payload(raw))
    assert len(str(refusal.value)) < 600
