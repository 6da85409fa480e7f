"""Every kind of value that has memory of its own to send, in a size that is asked for.

`CASES` has a maker for each: `maker(nbytes)` gives the same value every time, with about `nbytes` in its largest
buffer. `assert_same` says whether what arrived is what was sent, bit by bit.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from tests.unit.wire.test_tensors import bits, make
from zrpc.wire.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

Maker = "Callable[[int], Any]"


# ---- classes that travel ---------------------------------------------------------------------------------------------


class Tagged(Tensor):
    """A tensor subclass with an attribute of its own."""

    tag = ""


class Blob:
    """An object that hands out its memory as PEP 574 has it, and is made of memory again."""

    def __init__(self, memory: Any, writable: bool = True) -> None:
        self.memory = memory
        self.writable = writable

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        assert int(protocol) >= 5
        memory = self.memory if self.writable else memoryview(self.memory).toreadonly()
        return Blob, (pickle.PickleBuffer(memory), self.writable)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and bytes(self.memory) == bytes(other.memory)

    __hash__ = None  # type: ignore[assignment]


class Both:
    """An ordinary object with tensors and arrays in its attributes."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = make(torch.float32, nbytes)
        self.array = np.arange(nbytes // 8)
        self.same = self.tensor[1:]


# ---- makers ----------------------------------------------------------------------------------------------------------


def floats(nbytes: int) -> Tensor:
    """Four rows, of ordinary numbers."""
    return torch.arange(max(8, nbytes // 16 * 4), dtype=torch.float32).view(4, -1) / 7


def complexes(nbytes: int) -> Tensor:
    return torch.view_as_complex(floats(nbytes).view(4, -1, 2).contiguous())


def strided(dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """A dtype, in every way to lie in memory that needs no operator."""
    return {
        "contiguous": lambda n: make(dtype, n),
        "transposed": lambda n: make(dtype, n).t(),
        "slice": lambda n: make(dtype, n)[:, 1:-1],
        "offset": lambda n: make(dtype, n).view(-1)[3:],
    }


LAYOUTS: dict[str, Callable[[int], Any]] = {
    "flipped": lambda n: floats(n).flip(0, 1),
    "permuted": lambda n: floats(n).view(2, 2, -1).permute(2, 0, 1),
    "expanded": lambda n: floats(n).view(1, -1).expand(3, -1),
    "a column of many": lambda n: floats(4 * n).view(-1, 4)[:, 1],
    "every other row": lambda n: floats(2 * n)[::2],
    "overlapping": lambda n: floats(n).view(-1).as_strided((n // 4 - 7, 8), (1, 1)),
    "channels last": lambda n: floats(n).view(2, 2, 2, -1).to(memory_format=torch.channels_last),
    "a leaf with grad": lambda n: floats(n).requires_grad_(),
    "a result with grad": lambda n: floats(n).requires_grad_() * 2,
    "a slice with grad": lambda n: floats(n).requires_grad_()[:, 2:],
    "conjugate": lambda n: complexes(n).conj(),
    "conjugate and transposed": lambda n: complexes(n).t().conj(),
    "negative": lambda n: complexes(n).conj().imag,
    "inference": lambda n: _inference(n),
}

SMALL: dict[str, Callable[[int], Any]] = {
    "0-dim": lambda _: torch.tensor(1.5, dtype=torch.float64),
    "0-dim of a large one": lambda n: floats(n)[1, 2],
    "no elements": lambda _: torch.empty(0),
    "no rows": lambda _: torch.empty(0, 3, dtype=torch.int16),
    "no columns": lambda _: torch.empty(3, 0, 2, dtype=torch.complex64),
    "no elements of a large one": lambda n: floats(n)[:, 5:5],
    "no elements with grad": lambda _: torch.empty(2, 0, requires_grad=True),
    "coo of no elements": lambda n: torch.sparse_coo_tensor(size=(n, 3)),
    "csr of no elements": lambda n: torch.zeros(4, n).to_sparse_csr(),
    "meta": lambda n: torch.empty(n, 3, dtype=torch.bfloat16, device="meta", requires_grad=True),
    "meta and transposed": lambda n: torch.empty(n, 3, device="meta").t(),
    "an array of no elements": lambda _: np.empty((0, 3)),
    "a 0-dim array": lambda _: np.array(2.5),
    "a numpy number": lambda _: np.float32(1.5),
    "no bytes": lambda _: b"",
}
"""Values of a few bytes, whatever is asked for."""

SPARSE: dict[str, Callable[[int], Any]] = {
    "coo": lambda n: floats(n).view(-1, 2).to_sparse(),
    "coo, not coalesced": lambda n: _uncoalesced(n),
    "coo, hybrid": lambda n: floats(n).view(-1, 2, 8).to_sparse(1),
    "coo with grad": lambda n: floats(n).view(-1, 2).to_sparse().requires_grad_(),
    "csr": lambda n: floats(n).view(-1, 8).to_sparse_csr(),
    "csc": lambda n: floats(n).view(-1, 8).to_sparse_csc(),
    "bsr": lambda n: floats(n).view(-1, 8).to_sparse_bsr((2, 2)),
    "bsc": lambda n: floats(n).view(-1, 8).to_sparse_bsc((2, 2)),
}

QUANTIZED: dict[str, Callable[[int], Any]] = {
    **{
        f"by tensor {dtype}": lambda n, dtype=dtype: torch.quantize_per_tensor(floats(4 * n), 0.05, 3, dtype)
        for dtype in (torch.quint8, torch.qint8, torch.qint32)
    },
    **{
        f"by channel {dtype}": lambda n, dtype=dtype: torch.quantize_per_channel(
            floats(4 * n), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.arange(4), 0, dtype
        )
        for dtype in (torch.quint8, torch.qint8, torch.qint32)
    },
    "transposed": lambda n: torch.quantize_per_tensor(floats(4 * n).t(), 0.05, 3, torch.qint8),
}

SHARED: dict[str, Callable[[int], Any]] = {
    "a tensor twice": lambda n: [t := floats(n), t],
    "a tensor and a slice": lambda n: [t := floats(n), t[2:]],
    "slices that overlap": lambda n: {"one": (t := floats(n))[:3], "other": t[2:]},
    "a tensor and its transpose": lambda n: ((t := floats(n)).t(), t),
    "columns of one": lambda n: [(t := floats(n))[:, 0::2], t[:, 1::2]],
    "one storage, two dtypes": lambda n: [t := floats(n), t.view(torch.int32)],
    "beside others": lambda n: [floats(n), t := floats(n), t[1:], torch.ones(3)],
}

CLASSES: dict[str, Callable[[int], Any]] = {
    "parameter": lambda n: torch.nn.Parameter(floats(n)),
    "frozen parameter": lambda n: torch.nn.Parameter(floats(n), requires_grad=False),
    "subclass": lambda n: _tagged(n),
    "module": lambda n: _module(n),
    "state dict": lambda n: dict(_module(n).state_dict()),
    "object": Both,
    "storage": lambda n: floats(n).untyped_storage(),
    "storage and a view of it": lambda n: [(t := floats(n)).untyped_storage(), t[1:]],
}

ARRAYS: dict[str, Callable[[int], Any]] = {
    **{
        f"array of {dtype}": lambda n, dtype=dtype: np.arange(n // np.dtype(dtype).itemsize).astype(dtype)
        for dtype in ("?", "i1", "u2", "<i4", ">i4", "f2", "f8", "c16", "S7", "U5", "V6")
    },
    "F order": lambda n: np.asfortranarray(np.arange(n // 8.0).reshape(2, -1)),
    "structured": lambda n: np.frombuffer(bytes(range(13)) * (n // 13), [("a", "i1"), ("b", "f8"), ("c", "u4")]).copy(),
    "readonly": lambda n: _readonly(n),
    "of tensor": lambda n: floats(n).numpy(),
}

IN_BAND: dict[str, Callable[[int], Any]] = {
    "objects": lambda n: np.array([*range(n // 16), "a", None], dtype=object),
    "bytes": lambda n: bytes(range(256)) * (n // 256),
    "bytearray": lambda n: bytearray(range(256)) * (n // 256),
    "masked": lambda n: np.ma.masked_less(np.arange(n // 8.0), 5.0),
    "a slice": lambda n: np.arange(n // 2.0)[::2],
    "backwards": lambda n: np.arange(n // 8.0)[::-1],
    "broadcast": lambda n: np.broadcast_to(np.arange(n // 8.0), (3, n // 8)),
    "dates": lambda n: np.arange(n // 8).astype("M8[s]"),
    "durations": lambda n: np.arange(n // 8).astype("m8[ns]"),
    "text": lambda n: "äöü" * (n // 6),
    "PEP 574": lambda n: Blob(bytearray(range(256)) * (n // 256)),
    "PEP 574, readonly": lambda n: Blob(bytes(range(256)) * (n // 256), writable=False),
    "PEP 574 of an array": lambda n: Blob(np.arange(n, dtype=np.uint8)),
}
"""What pickle leaves in its stream, which rides in frame 0 until it is large."""

BUFFERS: dict[str, Callable[[int], Any]] = {
    "all at once": lambda n: [floats(n), np.arange(n // 8), Blob(bytearray(n)), {"x": complexes(n).conj()}, b"y" * 10],
}


def _inference(nbytes: int) -> Tensor:
    with torch.inference_mode():
        return floats(nbytes) * 2


def _uncoalesced(nbytes: int) -> Tensor:
    indices = torch.arange(nbytes // 8).repeat(2)[None] // 2
    return torch.sparse_coo_tensor(indices, torch.arange(float(indices.shape[1])), (nbytes,), check_invariants=False)


def _tagged(nbytes: int) -> Tagged:
    tagged = floats(nbytes).as_subclass(Tagged)
    tagged.tag = "seven"
    return tagged


def _module(nbytes: int) -> torch.nn.Module:
    module = torch.nn.Linear(4, max(1, nbytes // 16))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    return module


def _readonly(nbytes: int) -> Any:
    array = np.arange(nbytes // 8)
    array.flags.writeable = False
    return array


def _table(group: str, makers: dict[str, Callable[[int], Any]]) -> dict[str, Callable[[int], Any]]:
    return {f"{group}: {name}": maker for name, maker in makers.items()}


LARGE: dict[str, Callable[[int], Any]] = {
    **{f"{name}: {kind}": maker for name, dtype in DTYPES.items() for kind, maker in strided(dtype).items()},
    **_table("layout", LAYOUTS),
    **_table("sparse", SPARSE),
    **_table("quantized", QUANTIZED),
    **_table("shared storage", SHARED),
    **_table("class", CLASSES),
    **_table("array", ARRAYS),
    **_table("buffer", BUFFERS),
}
CASES: dict[str, Callable[[int], Any]] = {**LARGE, **_table("small", SMALL), **_table("in band", IN_BAND)}


# ---- comparing -------------------------------------------------------------------------------------------------------


def assert_same(got: Any, sent: Any) -> None:
    """`got` is what arrived of `sent`: the same in every bit, and writable if that was."""
    assert type(got) is type(sent)
    if isinstance(sent, Tensor):
        _assert_same_tensor(got, sent)
    elif isinstance(sent, np.ndarray):
        _assert_same_array(got, sent)
    elif isinstance(sent, torch.UntypedStorage):
        assert bytes(got.tolist()) == bytes(sent.tolist())
    elif isinstance(sent, dict):
        assert list(got) == list(sent)
        assert_same(list(got.values()), list(sent.values()))
    elif isinstance(sent, (list, tuple)):
        assert len(got) == len(sent)
        for one, other in zip(got, sent, strict=True):
            assert_same(one, other)
        assert _groups(got) == _groups(sent)
    elif isinstance(sent, torch.nn.Module):
        assert_same(dict(got.state_dict()), dict(sent.state_dict()))
    elif isinstance(sent, Both):
        assert_same([got.tensor, got.array, got.same], [sent.tensor, sent.array, sent.same])
    else:
        assert got == sent
        assert not isinstance(sent, Blob) or memoryview(got.memory).readonly != sent.writable


def _groups(values: Any) -> list[int]:
    """Which tensors share a storage: for each, the first one that has the same."""
    storages = [
        (value if isinstance(value, torch.UntypedStorage) else value.untyped_storage())._cdata
        for value in values
        if isinstance(value, torch.UntypedStorage)
        or (isinstance(value, Tensor) and value.layout is torch.strided and value.numel() and not value.is_meta)
    ]
    return [storages.index(storage) for storage in storages]


def _assert_same_tensor(got: Tensor, sent: Tensor) -> None:
    assert (got.dtype, got.shape, got.device, got.layout) == (sent.dtype, sent.shape, sent.device, sent.layout)
    assert got.requires_grad == sent.requires_grad
    assert got.is_leaf
    assert not got.is_inference()
    assert getattr(got, "tag", None) == getattr(sent, "tag", None)
    if sent.is_meta:
        assert got.stride() == sent.stride()
    elif sent.layout is torch.strided and sent.is_quantized:
        assert got.qscheme() == sent.qscheme()
        assert torch.equal(got.int_repr(), sent.int_repr())
        assert torch.equal(got.dequantize(), sent.dequantize())
    elif sent.layout is torch.strided:
        _assert_same_bits(got.detach(), sent.detach())
    else:
        assert sent.layout is not torch.sparse_coo or got.is_coalesced() == sent.is_coalesced()
        for one, other in zip(_parts(got), _parts(sent), strict=True):
            _assert_same_bits(one.detach(), other.detach())


def _assert_same_bits(got: Tensor, sent: Tensor) -> None:
    if (got.is_conj(), got.is_neg()) != (sent.is_conj(), sent.is_neg()):  # it was made contiguous
        got, sent = got.resolve_conj().resolve_neg(), sent.resolve_conj().resolve_neg()
    plain_got, plain_sent = got.as_subclass(Tensor), sent.as_subclass(Tensor)
    assert np.array_equal(bits(plain_got), bits(plain_sent))


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _assert_same_array(got: Any, sent: Any) -> None:
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert got.flags.writeable == sent.flags.writeable or not sent.flags.c_contiguous
    if sent.flags.c_contiguous or sent.flags.f_contiguous:
        assert got.flags.f_contiguous == sent.flags.f_contiguous
    if sent.dtype == object:
        assert got.tolist() == sent.tolist()
    else:
        assert got.tobytes() == sent.tobytes()
