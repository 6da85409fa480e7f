"""Tensors as table entries and buffers.

An entry is a msgpack list that begins with its kind:

    [DENSE,      dtype, shape, requires_grad, buffer]                      memory with the strides of a new tensor
    [STRIDED,    dtype, shape, requires_grad, buffer, strides, offset, conj, neg]
    [COO,        shape, requires_grad, coalesced, dense_dim, indices, values]        the last two are entries
    [COMPRESSED, layout, shape, requires_grad, compressed, plain, values]            the last three are entries
    [QUANTIZED,  dtype, shape, scheme, parameters..., memory]                        memory: an entry, of its integers
    [META,       dtype, shape, requires_grad, strides, conj, neg]
    [PLACED,     device, entry]                                            to arrive on `device` of the receiver
    [NESTED,     requires_grad, values, sizes, strides, offsets]           strided; the last three are lists

`buffer` is an index into the envelope's buffers, or -1 where there is not one byte. Tensors of one message that share
a storage share one buffer and are views of one storage again on arrival. Of a storage, only the span that is
really seen travels; a tensor that sees only a small part of a large span (a column of a large matrix, say) is made
contiguous first.

Received tensors own their memory, are writable and never alias anything of the sender's or of another message. They
take over the memory of large received frames: a message is unpacked once.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import SerializationError
from zrpc.wire.envelope import INLINE_MAX_NBYTES, Arriving, Buffer
from zrpc.wire.route import CPU_ONLY, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_torch: Any = torch  # parts of it are untyped

Outgoing = list[Buffer | Arriving]
"""The buffers of a message that is packed."""

DENSE, STRIDED, COO, COMPRESSED, QUANTIZED, META, PLACED, NESTED = range(8)

NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for name in sorted(dir(torch))
    if isinstance(dtype := getattr(torch, name), torch.dtype)
}
INTEGERS = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}
"""As what the memory of quantized tensors travels, element by element."""
PACKED = {torch.quint4x2, torch.quint2x4}
"""Those with several elements in a byte: their bytes travel as they are."""
DTYPES = {name: dtype for dtype, name in NAMES.items() if dtype not in INTEGERS and dtype not in PACKED}
"""What memory can be seen as. torch crashes where a plain tensor of a quantized dtype is given another shape; quantized
tensors are made of their integers."""
COMPRESSED_LAYOUTS = {
    str(layout): layout for layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
}
_NUMPY_HAS = frozenset({
    torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
})  # fmt: skip
"""What numpy sees as it is, and memoryviews can cast: three times as fast as a view made of the storage."""
_ROW_LAYOUTS = (torch.sparse_csr, torch.sparse_bsr)

Span = tuple[int, int]

GATHER_MIN_NBYTES = 8192
GATHER_MIN_RATIO = 2
"""A tensor is made contiguous before it is sent if the span that it sees is this large, and this many times what it
needs. Programs rely on smaller ones to arrive with their strides, as they do over torch's transport."""


def pack(tensors: Sequence[torch.Tensor], buffers: Outgoing, route: Route) -> list[Any]:
    """The table entries of `tensors`; their memory is appended to `buffers` (large memory as views, not copies).

    Raises:
        SerializationError: a tensor cannot travel; the message says which and what to do.
    """
    try:
        if len(tensors) == 1:
            return [_pack_one(tensors[0], buffers, route)]
        shared = shared_storages(tensors)
        if not shared:
            return [_pack_one(tensor, buffers, route) for tensor in tensors]
        packer = _SharedPacker(buffers, route, shared)
        return [packer.entry(tensor) for tensor in tensors]
    except RuntimeError as error:
        refuse_wrapped(tensors, error)
        raise


def refuse_wrapped(tensors: Sequence[torch.Tensor], error: RuntimeError) -> None:
    """Packing `tensors` failed with `error`: raise what explains it, if one of them has no data of its own.

    Raises:
        SerializationError: one of them is inside a function transform.
    """
    for tensor in tensors:
        if _torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
            raise SerializationError(
                "a tensor inside a function transform of torch.func (grad, vmap, jvp, functionalize) or torch.compile "
                "cannot be sent: there it stands for others. Make remote calls outside of the transformed function"
            ) from error


class _SharedPacker:
    """The packing of a message in which several tensors see one storage.

    Args:
        buffers: are appended to.
        route: where tensors go.
        shared: the spans of storages that several tensors of the message see.
    """

    def __init__(self, buffers: Outgoing, route: Route, shared: Mapping[int, Span]) -> None:
        self._buffers = buffers
        self._route = route
        self._shared = shared
        self._placed: dict[int, int] = {}

    def entry(self, tensor: torch.Tensor) -> list[Any]:
        """The table entry of `tensor`."""
        if is_special(tensor):
            return pack_special(tensor, lambda part: self.entry(part.detach()))
        key = _storage_key(tensor)
        span = self._shared.get(key)
        if span is None or not tensor.numel():
            return _pack_one(tensor, self._buffers, self._route)
        if key not in self._placed:
            self._placed[key] = _add_span(tensor.untyped_storage(), span, self._buffers)
        return strided_entry(tensor, self._placed[key], span[0])


def _pack_one(tensor: torch.Tensor, buffers: Outgoing, route: Route) -> list[Any]:
    if tensor.is_cpu:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return pack_special(tensor, lambda part: _pack_one(part.detach(), buffers, route))
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            shape = tensor.shape
            if (1 not in shape and 0 not in shape) or tensor.stride() == contiguous_strides(shape):  # see `is_dense`
                return _dense_entry(tensor, shape, buffers)
        return _pack_strided(tensor, buffers)
    if tensor.is_meta:
        return pack_meta(tensor)
    raise route.unmapped(str(tensor.device))


def is_special(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no plain memory of its own, but parts."""
    return tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a DENSE entry says all of `tensor`.

    torch calls a tensor contiguous whatever its strides along dimensions of size 0 or 1 are.
    """
    is_plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return is_plain and tensor.stride() == contiguous_strides(tensor.shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides that torch gives a new tensor of that shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(strides[::-1])


def pack_meta(tensor: torch.Tensor) -> list[Any]:
    """The entry of a tensor without memory."""
    if is_special(tensor):
        return pack_special(tensor, lambda part: pack_meta(part.detach()))
    return [
        META, NAMES[tensor.dtype], list(tensor.shape), tensor.requires_grad,
        list(tensor.stride()), tensor.is_conj(), tensor.is_neg(),
    ]  # fmt: skip


def _dense_entry(tensor: torch.Tensor, shape: torch.Size, buffers: Outgoing) -> list[Any]:
    nbytes = tensor.nbytes
    entry = [DENSE, NAMES[tensor.dtype], shape, tensor.requires_grad, len(buffers) if nbytes else -1]
    if not nbytes:
        return entry
    if nbytes <= INLINE_MAX_NBYTES:
        address = tensor.data_ptr()
        if not address:
            raise _without_memory()
        buffers.append(ctypes.string_at(address, nbytes))
    else:
        buffers.append(_bytes_of(tensor, nbytes))
    return entry


def _bytes_of(tensor: torch.Tensor, nbytes: int) -> memoryview:
    """The memory of a contiguous tensor, not copied; the view keeps it alive."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    storage = tensor.untyped_storage()
    if not tensor.data_ptr():
        raise _without_memory()
    if start + nbytes <= storage.nbytes() and tensor.dtype in _NUMPY_HAS:
        return (tensor.detach() if tensor.requires_grad else tensor).numpy().data.cast("B")
    return raw_view(storage, start, nbytes).numpy().data


def _pack_strided(tensor: torch.Tensor, buffers: Outgoing) -> list[Any]:
    span = span_of(tensor)
    if is_gathered(tensor, span):
        return _pack_one(gathered(tensor), buffers, CPU_ONLY)
    return strided_entry(tensor, _add_span(tensor.untyped_storage(), span, buffers), span[0])


def is_gathered(tensor: torch.Tensor, span: Span) -> bool:
    """Whether `tensor`, which sees `span` of its storage, is made contiguous before it is sent."""
    start, stop = span
    return stop - start >= max(GATHER_MIN_NBYTES, GATHER_MIN_RATIO * tensor.nbytes)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of `tensor`, a leaf."""
    return tensor.detach().contiguous().requires_grad_(tensor.requires_grad)


def strided_entry(tensor: torch.Tensor, buffer: int, span_start: int) -> list[Any]:
    """The entry of a view whose storage's bytes from `span_start` on are in `buffer`."""
    offset = tensor.storage_offset() - span_start // tensor.element_size()
    return [
        STRIDED, NAMES[tensor.dtype], tensor.shape, tensor.requires_grad, buffer,
        tensor.stride(), offset, tensor.is_conj(), tensor.is_neg(),
    ]  # fmt: skip


def span_of(tensor: torch.Tensor) -> Span:
    """First byte and end of what `tensor` sees of its storage."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return start, start
    last = sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def _add_span(storage: torch.UntypedStorage, span: Span, buffers: Outgoing) -> int:
    start, stop = span
    if start == stop:
        return -1
    small = stop - start <= INLINE_MAX_NBYTES and stop <= storage.nbytes()
    buffers.append(
        ctypes.string_at(storage.data_ptr() + start, stop - start)
        if small
        else raw_view(storage, start, stop - start).numpy().data
    )
    return len(buffers) - 1


def raw_view(
    storage: torch.UntypedStorage, start: int, nbytes: int, device: torch.device | None = None
) -> torch.Tensor:
    """The bytes of `storage`, not copied; the view keeps the storage alive. `device`: where it is, if not on the CPU.

    Raises:
        SerializationError: the storage has been shrunk under its tensors, and has no such bytes.
    """
    if start + nbytes > storage.nbytes():  # `set_` would make the sender's own storage larger
        raise _without_memory()
    raw = torch.empty(0, dtype=torch.uint8, device=device)
    return raw.set_(storage, start, (nbytes,))  # type: ignore[call-overload,no-any-return]


def _without_memory() -> SerializationError:
    return SerializationError(
        "a tensor whose storage was made smaller than the tensor cannot be sent: send it while it has its memory"
    )


def _storage_key(tensor: torch.Tensor) -> int:
    """Which storage a plain CPU tensor sees; 0 for every other tensor."""
    if not tensor.is_cpu or is_special(tensor):
        return 0
    key: int = tensor.untyped_storage()._cdata
    return key


def shared_storages(
    tensors: Sequence[torch.Tensor], storage_key: Callable[[torch.Tensor], int] = _storage_key
) -> dict[int, Span]:
    """The storages that more than one of `tensors` sees, each with the span they see together.

    The span begins on a multiple of the largest element, so that every view keeps its alignment.
    """
    keys = list(map(storage_key, tensors))
    if 0 not in keys and len(set(keys)) == len(keys):  # as a rule; special tensors have no key
        return {}
    seen: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    for tensor, key in zip(tensors, keys, strict=True):
        if key:
            if tensor.numel():
                seen[key].append(tensor)
        elif is_special(tensor):
            for part in _parts_of(tensor):
                if part.numel():
                    seen[storage_key(part)].append(part)
    shared = {}
    for key, views in seen.items():
        if key and len(views) > 1:
            spans = [span_of(view) for view in views]
            widest = max(view.element_size() for view in views)
            start = min(start for start, _ in spans) // widest * widest
            shared[key] = (start, max(stop for _, stop in spans))
    return shared


def _parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors in which a special one is sent."""
    parts: list[torch.Tensor] = []

    def collect(part: torch.Tensor) -> list[Any]:
        parts.extend(_parts_of(part) if is_special(part) else (part,))
        return []

    pack_special(tensor, collect)
    return parts


def pack_special(tensor: torch.Tensor, part: Callable[[torch.Tensor], list[Any]]) -> list[Any]:
    """The entry of a tensor that is sent in parts.

    Args:
        tensor: sparse, quantized or nested.
        part: packs one of them.

    Raises:
        SerializationError: it is of a kind that cannot travel.
    """
    if tensor.is_nested:  # it has no shape
        return _pack_nested(tensor, part)
    shape, grad = list(tensor.shape), tensor.requires_grad
    if tensor.layout is torch.sparse_coo:
        dense_dim = tensor.dense_dim()
        return [COO, shape, grad, tensor.is_coalesced(), dense_dim, part(tensor._indices()), part(tensor._values())]
    if str(tensor.layout) in COMPRESSED_LAYOUTS:
        by_row = tensor.layout in _ROW_LAYOUTS
        compressed = tensor.crow_indices() if by_row else tensor.ccol_indices()
        plain = tensor.col_indices() if by_row else tensor.row_indices()
        return [COMPRESSED, str(tensor.layout), shape, grad, part(compressed), part(plain), part(tensor.values())]
    if tensor.is_quantized:
        return _pack_quantized(tensor, part)
    raise _unsendable(tensor.layout)


def _pack_nested(tensor: torch.Tensor, part: Callable[[torch.Tensor], list[Any]]) -> list[Any]:
    if tensor.layout is not torch.strided:
        raise _unsendable("nested")
    nested: Any = tensor.detach()
    if nested.is_quantized or nested.is_meta:
        raise _unsendable("nested, quantized or meta")
    sizes, strides = nested._nested_tensor_size(), nested._nested_tensor_strides()
    views = (sizes, strides, nested._nested_tensor_storage_offsets()) if nested.size(0) else (torch.empty(0),) * 3
    return [NESTED, tensor.requires_grad, part(nested.values()), *[one.tolist() for one in views]]


def _unsendable(layout: object) -> SerializationError:
    return SerializationError(f"a tensor of layout {layout} cannot be sent: send its parts, or tensor.to_dense()")


def _pack_quantized(tensor: torch.Tensor, part: Callable[[torch.Tensor], list[Any]]) -> list[Any]:
    head = [QUANTIZED, NAMES[tensor.dtype], list(tensor.shape)]
    memory = part(_integers_of(tensor))
    if tensor.qscheme() is torch.per_tensor_affine:
        return [*head, "tensor", tensor.q_scale(), tensor.q_zero_point(), 0, memory]
    if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return [*head, "channel", part(scales), part(zero_points), tensor.q_per_channel_axis(), memory]
    raise SerializationError(f"a tensor quantized by {tensor.qscheme()} cannot be sent: send tensor.dequantize()")


def _integers_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a quantized tensor as a plain one: a view with its strides, or all bytes if elements are packed."""
    storage: Any = tensor.untyped_storage()
    if tensor.dtype not in PACKED:
        view: Any = torch.empty(0, dtype=INTEGERS[tensor.dtype], device=tensor.device)
        return view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[no-any-return]
    if not is_dense(tensor) or tensor.storage_offset():
        raise SerializationError(f"a view of a {tensor.dtype} tensor cannot be sent: send tensor.dequantize()")
    return raw_view(storage, 0, storage.nbytes(), tensor.device)
