"""Tensors of every dtype, layout and size arrive as they were, in memory of their own."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.unit.wire.travel import received, sent, travel, travel_tensors
from zrpc.errors import ProtocolError, SerializationError
from zrpc.wire.envelope import Envelope, decode
from zrpc.wire.messages import Reply
from zrpc.wire.payload import Payload, open_payload
from zrpc.wire.received import unpack
from zrpc.wire.tensors import DTYPES, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

QUANTIZED = ["qint8", "quint8", "qint32", "quint4x2", "quint2x4"]

SIZES = {"rides inside": 2_000, "is copied": 12_000, "is taken over": 70_000}
"""How a buffer of so many bytes travels."""

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t(),
    "three dimensions permuted": lambda t: t.view(2, -1, t.shape[1]).permute(2, 0, 1),
    "column": lambda t: t[:, 1],
    "every other": lambda t: t[::2, 1::3],
    "expanded": lambda t: t[:1].expand(5, -1),
    "offset": lambda t: t[1:],
    "offset by an odd number": lambda t: t.view(-1)[3:],
    "no elements": lambda t: t[:0],
    "no elements behind the end": lambda t: t[:, t.shape[1] :],
    "0-dim": lambda t: t[1, 2],
    "0-dim at the front": lambda t: t[0, 0],
    "overlapping": lambda t: t.as_strided((4, 4), (1, 1)),
}
STRIDES_LOST = {"column", "every other"}
"""Views that see only a little of their span are made contiguous."""


def make(dtype: torch.dtype, nbytes: int) -> Tensor:
    """Four rows of arbitrary bits, `nbytes` or a little less."""
    columns = nbytes // dtype.itemsize // 8 * 2
    count = columns * 4 * dtype.itemsize
    pattern = (np.arange(count, dtype=np.int64) * 37 % 251).astype(np.uint8)
    if dtype is torch.bool:
        pattern &= 1
    return torch.frombuffer(bytearray(pattern.tobytes()), dtype=dtype).view(4, columns)


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The elements of a strided tensor, bit by bit, without an operator (few dtypes have all of them)."""
    storage = tensor.untyped_storage()
    raw = ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
    size = tensor.element_size()
    flat = np.frombuffer(raw + bytes(size), dtype=f"V{size}", count=len(raw) // size + 1)
    start = flat[min(tensor.storage_offset(), len(flat) - 1) :]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, [stride * size for stride in tensor.stride()]).copy()


def assert_same(before: Tensor, after: Tensor, *, strides: bool = True) -> None:
    assert type(after) is Tensor
    assert (after.dtype, after.shape, after.device, after.layout) == (
        before.dtype,
        before.shape,
        before.device,
        before.layout,
    )
    assert after.requires_grad == before.requires_grad
    assert after.is_leaf
    assert (after.is_conj(), after.is_neg()) == (before.is_conj(), before.is_neg())
    if before.layout is torch.strided and not before.is_quantized:
        assert np.array_equal(bits(after), bits(before))
        if strides and before.numel():
            assert after.stride() == before.stride()


def overwrite(tensor: Tensor) -> None:
    """Write to all the memory of `tensor`."""
    with torch.no_grad():
        tensor.untyped_storage().fill_(0xAA)  # type: ignore[attr-defined]  # its stubs lack it


def assert_own_memory(tensor: Tensor) -> None:
    """What is received is writable, and writing to it changes neither what was sent nor what is sent again."""
    original = bits(tensor)
    frames = sent(Payload(tensors=[tensor]))
    after = open_payload(decode(received(frames))).tensors[0]
    overwrite(after)
    assert np.array_equal(bits(tensor), original)
    again = open_payload(decode(received(frames))).tensors[0]
    assert np.array_equal(bits(again), original)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_arrives_in_every_view_and_size(name: str) -> None:
    for nbytes, (kind, view) in itertools.product(SIZES.values(), VIEWS.items()):
        tensor = view(make(DTYPES[name], nbytes))
        if kind in STRIDES_LOST and not _can_be_copied(tensor):
            continue
        assert_same(tensor, travel_tensors(tensor)[0], strides=kind not in STRIDES_LOST)
        assert_own_memory(tensor)


def _can_be_copied(tensor: Tensor) -> bool:
    """Some dtypes are no more than a name and have no operators, not even the one that makes them contiguous."""
    try:
        tensor.contiguous()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def test_the_dtypes_that_cannot_be_made_contiguous_are_few() -> None:
    stuck = {name for name, dtype in DTYPES.items() if not _can_be_copied(make(dtype, 2000).t())}
    assert stuck <= {f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)} | {"float4_e2m1fn_x2"}


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_conjugate_and_negative_views_stay_what_they_are(dtype: torch.dtype) -> None:
    for nbytes in SIZES.values():
        _stay_what_they_are(make(dtype, nbytes))


def _stay_what_they_are(tensor: Tensor) -> None:
    views = [tensor.conj(), tensor.t().conj(), tensor[:, 1].conj(), tensor.conj().imag, tensor[:, ::5].conj().imag]
    for view in views:
        assert view.is_conj() or view.is_neg()
        (after,) = travel_tensors(view)
        assert (after.dtype, after.shape) == (view.dtype, view.shape)
        resolved, expected = after.resolve_conj().resolve_neg(), view.resolve_conj().resolve_neg()
        assert np.array_equal(bits(resolved.contiguous()), bits(expected.contiguous()))
    assert_same(tensor.conj(), travel_tensors(tensor.conj())[0])
    assert_same(tensor.t().conj(), travel_tensors(tensor.t().conj())[0])
    negative = torch._neg_view(tensor)
    assert_same(negative, travel_tensors(negative)[0])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats_are_kept(memory_format: torch.memory_format) -> None:
    tensor = torch.randn(2, 3, 40, 50).to(memory_format=memory_format)
    (after,) = travel_tensors(tensor)
    assert_same(tensor, after)
    assert after.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5), (), (1,), (1, 1, 1)])
def test_odd_shapes_arrive(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    (after,) = travel_tensors(tensor)
    assert_same(tensor, after)
    assert_same(tensor, travel_tensors(after)[0])
    if tensor.numel() == 0:
        torch.add(after, 1, out=after)


@pytest.mark.parametrize("nbytes", SIZES.values(), ids=SIZES)
def test_requires_grad_arrives_and_the_graph_does_not(nbytes: int) -> None:
    leaf = torch.ones(nbytes // 4, requires_grad=True)
    product = leaf * 2
    slices = leaf[::7]
    for after, before in zip(travel_tensors(leaf, product, slices), (leaf, product, slices), strict=True):
        assert after.requires_grad
        assert after.is_leaf
        assert torch.equal(after, before)
        torch.autograd.backward(after.sum())
    assert leaf.grad is None
    (alone,) = travel_tensors(slices)
    assert alone.requires_grad
    assert torch.equal(alone, slices)


@pytest.mark.parametrize("nbytes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("view", VIEWS)
def test_what_arrives_in_no_grad_mode_may_be_written_to_in_grad_mode(view: str, nbytes: int) -> None:
    before = VIEWS[view](make(torch.complex64, nbytes))
    weight = torch.ones((), requires_grad=True)
    for tensor in (before, before.conj(), torch._neg_view(before)):
        with torch.no_grad():
            (after,) = travel_tensors(tensor)
        after = after.clone() if view in ("expanded", "overlapping") else after  # several elements in one place
        after.mul_(weight)
        assert after.grad_fn is not None


@pytest.mark.parametrize("shape", [[5], [7], [], [2, 2], [4, 2], [-1, 2], [2, 3, 0]])
def test_bytes_for_another_shape_are_refused(shape: list[int]) -> None:
    with pytest.raises(ProtocolError):
        unpack([[0, "float32", shape, False, 0]], [bytes(24)])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta_tensors_arrive_without_bytes(requires_grad: bool) -> None:
    tensor = torch.empty(1 << 20, 3, dtype=torch.bfloat16, device="meta", requires_grad=requires_grad)
    payload = Payload(tensors=[tensor, tensor.t()])
    assert sum(map(len, sent(payload))) < 200
    for before, after in zip(payload.tensors, travel(payload).tensors, strict=True):
        assert after.is_meta
        assert (after.dtype, after.shape, after.stride()) == (before.dtype, before.shape, before.stride())
        assert after.requires_grad == requires_grad


# ---- storages ----------------------------------------------------------------------------------------------------


def test_a_small_view_of_a_large_storage_does_not_bring_the_storage() -> None:
    large = torch.randn(1000, 1000)
    for view in (large[5], large[5:7].t(), large[:, 7], large[::100, ::100], large[3, 3], large[:1].expand(900, -1)):
        assert sum(map(len, sent(Payload(tensors=[view])))) < 10_000
        (after,) = travel_tensors(view)
        assert torch.equal(after, view)
        assert after.untyped_storage().nbytes() < 10_000


PAIRS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "twice": lambda t: [t, t],
    "a slice": lambda t: [t, t[2:]],
    "the slice first": lambda t: [t[2:], t],
    "transposed": lambda t: [t, t.t()],
    "overlapping": lambda t: [t[:3], t[2:]],
    "apart": lambda t: [t[:1], t[3:]],
    "columns": lambda t: [t[:, 0], t[:, 1]],
    "as integers": lambda t: [t, t.view(torch.int16)],
    "as smaller integers, and from an odd place": lambda t: [
        t.view(torch.int8).view(-1)[3:50],
        t[0, 1:].view(torch.int32),
    ],
    "as complex numbers": lambda t: [torch.view_as_complex(t.view(4, -1, 2)), t],
    "conjugate": lambda t: [torch.view_as_complex(t.view(4, -1, 2)).conj(), t],
    "with grad": lambda t: [t.detach().requires_grad_(), t[1:]],
    "expanded": lambda t: [t[:1].expand(3, -1), t],
    "beside another": lambda t: [t, torch.ones(3), t[2:], torch.zeros(5000)],
    "beside an empty view": lambda t: [t[3:], t[:, :0], t],
}


@pytest.mark.parametrize("kind", PAIRS)
def test_shared_storage_stays_shared(kind: str) -> None:
    for nbytes in SIZES.values():
        _stays_shared(PAIRS[kind](make(torch.float32, nbytes)))


def _stays_shared(tensors: list[Tensor]) -> None:
    after = travel_tensors(*tensors)
    for one, other in zip(tensors, after, strict=True):
        assert_same(one, other)
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    groups = [storages.index(storage) for storage in storages]
    received_storages = [t.untyped_storage().data_ptr() for t in after if t.numel()]
    assert [received_storages.index(storage) for storage in received_storages] == groups
    originals = [bits(t) for t in tensors]
    overwrite(after[0])
    for one, other, original in zip(tensors, after, originals, strict=True):
        assert np.array_equal(bits(one), original)
        if other.numel() and other.untyped_storage().data_ptr() == after[0].untyped_storage().data_ptr():
            assert bytes(bits(other).tobytes()) == b"\xaa" * (other.numel() * other.element_size())


def test_storage_that_views_share_travels_once_and_only_as_far_as_they_see() -> None:
    large = torch.randn(1000, 1000)
    payload = Payload(tensors=[large[500:520], large[510:530].t(), large[505, :5]])
    assert 30 * 4000 <= sum(map(len, sent(payload))) < 30 * 4000 + 500
    for before, after in zip(payload.tensors, travel(payload).tensors, strict=True):
        assert_same(before, after)


def test_an_empty_view_does_not_widen_what_is_sent() -> None:
    large = torch.randn(1000, 1000)
    payload = Payload(tensors=[large[:2], large[1:3], large[1000:]])
    assert sum(map(len, sent(payload))) < 13_000
    assert [tuple(t.shape) for t in travel(payload).tensors] == [(2, 1000), (2, 1000), (0, 1000)]


def test_tensors_of_numpy_arrays_arrive_even_from_memory_that_cannot_be_written() -> None:
    array = np.arange(40_000, dtype=np.float64)
    array.flags.writeable = False
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.from_numpy(array)
    (after,) = travel_tensors(tensor)
    after.zero_()
    assert array[7] == 7


@pytest.mark.parametrize("nbytes", SIZES.values(), ids=SIZES)
def test_a_tensor_whose_memory_was_taken_away_is_refused(nbytes: int) -> None:
    tensor = make(torch.float32, nbytes).clone()
    views = [tensor, tensor.t()]
    tensor.untyped_storage().resize_(0)
    for view in views:
        with pytest.raises(SerializationError, match="smaller than the tensor"):
            sent(Payload(tensors=[view]))
    assert tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda raw: memoryview(bytes(raw)), lambda raw: _misaligned(raw)])
def test_frames_that_cannot_be_taken_over_are_copied(kind: Callable[[Any], Any]) -> None:
    tensor = torch.randn(10_000)
    frames = [kind(frame) if len(frame) > 4096 else frame for frame in sent(Payload(tensors=[tensor]))]
    (after,) = open_payload(decode(frames)).tensors
    assert torch.equal(after, tensor)
    assert after.data_ptr() % 8 == 0
    after.zero_()


def _misaligned(raw: Any) -> memoryview:
    return memoryview(bytearray(1) + bytearray(raw))[1:]


# ---- sparse and quantized ------------------------------------------------------------------------------------------


def _coo(dense: Tensor, sparse_dim: int, coalesced: bool) -> Tensor:
    tensor = dense.to_sparse(sparse_dim)
    if coalesced:
        return tensor
    return torch.sparse_coo_tensor(
        torch.cat([tensor.indices(), tensor.indices()], 1),
        torch.cat([tensor.values(), tensor.values()]),
        dense.shape,
        check_invariants=False,
    )


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("sparse_dim", [1, 2, 3])
def test_coo_tensors_arrive(sparse_dim: int, coalesced: bool) -> None:
    for rows, requires_grad in itertools.product([0, 3, 400], [False, True]):
        _coo_arrives(rows, sparse_dim, coalesced, requires_grad)


def _coo_arrives(rows: int, sparse_dim: int, coalesced: bool, requires_grad: bool) -> None:
    dense = torch.zeros(rows + 1, 8, 4)
    dense[:rows, ::3] = torch.randn(rows, 3, 4)
    tensor = _coo(dense, sparse_dim, coalesced).requires_grad_(requires_grad)
    (after,) = travel_tensors(tensor)
    assert_same(tensor, after)
    assert after.is_coalesced() == tensor.is_coalesced()
    assert (after.sparse_dim(), after.dense_dim()) == (tensor.sparse_dim(), tensor.dense_dim())
    assert torch.equal(after._indices(), tensor._indices())
    assert torch.equal(after._values(), tensor._values())
    assert torch.equal(after.to_dense(), tensor.to_dense())
    with torch.no_grad():
        after._values().fill_(7)
        assert not torch.equal(after.to_dense(), tensor.to_dense()) or rows == 0


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str)
def test_compressed_tensors_arrive(layout: torch.layout) -> None:
    for size, batch in ((4, ()), (4, (2,)), (90, ())):
        _compressed_arrives(size, batch, layout)


def _compressed_arrives(size: int, batch: tuple[int, ...], layout: torch.layout) -> None:
    dense = torch.eye(size).repeat(1, 2).expand(*batch, size, 2 * size).contiguous()
    block = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    for requires_grad in (False, True):
        tensor = dense.to_sparse(layout=layout, blocksize=block).requires_grad_(requires_grad)
        (after,) = travel_tensors(tensor)
        assert_same(tensor, after)
        assert torch.equal(after.values(), tensor.values())
        by_row = layout in (torch.sparse_csr, torch.sparse_bsr)
        pairs = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
        for part in pairs:
            assert torch.equal(getattr(after, part)(), getattr(tensor, part)())
        assert torch.equal(after.to_dense(), dense)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
@pytest.mark.parametrize("by_channel", [False, True])
def test_quantized_tensors_arrive(by_channel: bool, dtype: torch.dtype) -> None:
    for columns in (0, 3, 9000):
        _quantized_arrives(by_channel, columns, dtype)


def _quantized_arrives(by_channel: bool, columns: int, dtype: torch.dtype) -> None:
    dense = torch.randn(4, columns)
    if by_channel:
        scales, zeros = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.tensor([0, 1, 2, 3])
        tensor = torch.quantize_per_channel(dense, scales, zeros, 0, dtype)
    else:
        tensor = torch.quantize_per_tensor(dense, 0.05, 7, dtype)
    (after,) = travel_tensors(tensor)
    assert_same(tensor, after)
    assert after.qscheme() == tensor.qscheme()
    assert torch.equal(after.int_repr(), tensor.int_repr())
    assert torch.equal(after.dequantize(), tensor.dequantize())
    if by_channel:
        assert torch.equal(after.q_per_channel_scales(), tensor.q_per_channel_scales())
        assert torch.equal(after.q_per_channel_zero_points(), tensor.q_per_channel_zero_points())
        assert after.q_per_channel_axis() == tensor.q_per_channel_axis()


QUANTIZED_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.permute(3, 2, 1, 0),
    "channels last, a batch of one": lambda t: t[:1].contiguous(memory_format=torch.channels_last),
    "offset": lambda t: t[1:, 1:],
    "no elements": lambda t: t[:0],
}


@pytest.mark.parametrize("view", QUANTIZED_VIEWS)
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
def test_quantized_tensors_keep_their_strides(dtype: torch.dtype, view: str) -> None:
    tensor = QUANTIZED_VIEWS[view](torch.quantize_per_tensor(torch.rand(2, 3, 4, 5), 0.1, 3, dtype))
    (after,) = travel_tensors(tensor)
    assert after.stride() == tensor.stride()
    assert torch.equal(after.dequantize(), tensor.dequantize())


def test_views_of_a_quantized_tensor_stay_views_of_one() -> None:
    tensor = torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)
    first, second = travel_tensors(tensor, tensor[1:])
    first.copy_(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    assert second.dequantize().tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.quint4x2], ids=str)
def test_tensors_quantized_by_float_parameters_arrive(dtype: torch.dtype) -> None:
    """As embedding tables are, also with two elements in a byte."""
    tensor = torch.quantize_per_channel(torch.randn(4, 9), torch.rand(4) + 0.1, torch.rand(4), 0, dtype)
    assert tensor.qscheme() is torch.per_channel_affine_float_qparams
    (after,) = travel_tensors(tensor)
    assert (after.qscheme(), after.dtype, after.stride()) == (tensor.qscheme(), tensor.dtype, tensor.stride())
    assert torch.equal(after.dequantize(), tensor.dequantize())
    assert torch.equal(after.q_per_channel_zero_points(), tensor.q_per_channel_zero_points())


@pytest.mark.parametrize("integers", [[0, "int32", [4], False, 0], [0, "int8", [4], False, 0]])
def test_quantized_tensors_of_other_memory_are_refused(integers: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack([[4, "quint8", [16], "tensor", 0.1, 0, 0, integers]], [bytes(16)])


NESTED: dict[str, Callable[[], Tensor]] = {
    "two dimensions": lambda: torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(1, 3)]),
    "transposed": lambda: torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(1, 3)]).transpose(1, 2),
    "integers": lambda: torch.nested.nested_tensor([torch.arange(2), torch.arange(3)]),
    "numbers": lambda: torch.nested.nested_tensor([torch.tensor(1.0), torch.tensor(2.0)]),
    "some empty": lambda: torch.nested.nested_tensor([torch.ones(0, 3), torch.ones(2, 3)]),
    "large": lambda: torch.nested.nested_tensor([torch.rand(200, 30), torch.rand(100, 30)]),
    "none": lambda: torch.nested.nested_tensor([]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", NESTED)
def test_nested_tensors_arrive(kind: str, requires_grad: bool) -> None:
    tensor = NESTED[kind]().detach()
    tensor.requires_grad_(requires_grad and tensor.is_floating_point())
    after = travel_tensors(tensor, torch.ones(1))[0]
    assert after.is_nested
    assert (after.dtype, after.requires_grad, after.is_leaf) == (tensor.dtype, tensor.requires_grad, True)
    assert after.size(0) == tensor.size(0)
    for one, other in zip(tensor.unbind(), after.unbind(), strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "views", [[[[4]], [[1]], [1]], [[[4]], [[2]], [0]], [[[-1]], [[1]], [0]], [[[2]], [[1]], [-1]], [[[2]], [[1]], []]]
)
def test_nested_tensors_that_see_more_than_came_are_refused(views: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        unpack([[7, False, [0, "int8", [4], False, 0], *views]], [bytes(4)])


@pytest.mark.parametrize(
    ("shape", "strides"), [((1, 3), (99, 1)), ((0, 3), (7, 2)), ((1,), (5,)), ((2, 1, 3), (3, 7, 1)), ((1, 1), (0, 0))]
)
def test_strides_of_sizes_0_and_1_are_kept(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """torch calls such tensors contiguous, whatever these strides are; kernels and views go by them."""
    for requires_grad in (False, True):
        tensor = torch.arange(300.0).as_strided(shape, strides).requires_grad_(requires_grad)
        for after in (*travel_tensors(tensor), travel_tensors(tensor, torch.ones(2))[0]):
            assert_same(tensor, after)
    assert travel_tensors(torch.empty_strided(shape, strides, device="meta"))[0].stride() == strides


def test_parts_of_sparse_tensors_share_memory_with_others() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    after, values = travel_tensors(sparse, sparse._values())
    values[0] = 9
    assert after.to_dense().tolist() == [9, 0, 2]


def test_sparse_and_strided_tensors_travel_together() -> None:
    values = torch.randn(5000)
    sparse = torch.sparse_coo_tensor(torch.arange(5000)[None], values, (5000,), check_invariants=False)
    after = travel_tensors(values, sparse, values[5:])
    assert torch.equal(after[0], values)
    assert torch.equal(after[1].to_dense(), values)
    assert torch.equal(after[2], values[5:])


def test_what_cannot_travel_is_refused_with_advice() -> None:
    if torch._C._has_mkldnn:
        with pytest.raises(SerializationError, match=r"layout torch\._mkldnn cannot be sent"):
            sent(Payload(tensors=[torch.ones(3).to_mkldnn()]))


# ---- damage --------------------------------------------------------------------------------------------------------

numbers = st.integers(-3, 1 << 70) | st.just(1 << 40)
parts = (
    numbers
    | st.none()
    | st.booleans()
    | st.text(max_size=4)
    | st.sampled_from(sorted(NAMES.values()))
    | st.lists(numbers)
)


@given(
    entry=st.sampled_from(
        [
            [0, "float32", [2, 3], False, 0],
            [1, "float32", [2, 3], False, 0, [3, 1], 0, False, False],
            [4, "qint8", [4, 4], "tensor", 0.1, 3, 0, [0, "int8", [16], False, 0]],
            [5, "int8", [3], False, [1], False, False],
            [7, False, [0, "int8", [24], False, 0], [[2, 3], [1, 3]], [[3, 1], [3, 1]], [0, 6]],
        ]
    ),
    changes=st.lists(st.tuples(st.integers(0, 8), parts), min_size=1, max_size=3),
)
def test_changed_entries_are_read_or_refused(entry: list[Any], changes: list[tuple[int, Any]]) -> None:
    changed = list(entry)
    for at, part in changes:
        changed[at % len(changed)] = part
    with contextlib.suppress(ProtocolError):
        unpack([changed], [bytes(24)])


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_plain_memory_is_not_seen_as_quantized(dtype: str) -> None:
    """torch's `resize_` of such a tensor is a segmentation fault."""
    for entry in ([0, dtype, [2, 3], False, 0], [1, dtype, [2, 3], False, 0, [3, 1], 0, False, False]):
        with pytest.raises(ProtocolError, match="a tensor table cannot be read"):
            unpack([entry], [bytes(24)])


@pytest.mark.parametrize(
    "table", [[[]], [7], [[99]], [[0]], [[0, "float33", [], False, 0]], [[0, "int8", [24], False, 1]]]
)
def test_damaged_tables_are_refused(table: list[Any]) -> None:
    with pytest.raises(ProtocolError, match="tensor table"):
        unpack(table, [bytes(24)])


@pytest.mark.parametrize("count", [255, 256, 1000])
def test_the_thread_that_reads_does_not_decode_the_table_of_many_tensors(count: int) -> None:
    """A long table arrives as bytes, which are read when the message is opened."""
    before = [torch.full((2,), float(number)) for number in range(count)]
    arrived = decode(received(sent(Payload(tensors=before))))
    assert isinstance(arrived.table, bytes) == (count >= 256)
    after = open_payload(arrived).tensors
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("table", [b"garbage", b"\xc1", b"\x01", b"\x91"])
def test_a_packed_table_that_is_damaged_is_refused(table: bytes) -> None:
    """Whatever its bytes are, it is an error of the one message."""
    with pytest.raises(ProtocolError, match="a table of tensors"):
        open_payload(Envelope(Reply(), 1, None, b"", table, [b""]))
