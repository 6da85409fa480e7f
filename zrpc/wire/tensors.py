"""Tensors as table entries and buffers.

An entry is a msgpack list that begins with its kind:

    [DENSE,      dtype, shape, requires_grad, buffer]                      contiguous memory, nothing else in it
    [STRIDED,    dtype, shape, requires_grad, buffer, strides, offset, conj, neg]
    [COO,        shape, requires_grad, coalesced, dense_dim, indices, values]        the last two are entries
    [COMPRESSED, layout, shape, requires_grad, compressed, plain, values]            the last three are entries
    [QUANTIZED,  dtype, shape, scheme, parameters..., integers]
    [META,       dtype, shape, requires_grad, strides]
    [PLACED,     device, entry]                                            to arrive on `device` of the receiver

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

from zrpc.errors import ProtocolError, SerializationError, ZrpcError
from zrpc.wire.envelope import INLINE_MAX_NBYTES, Arriving, Buffer
from zrpc.wire.route import CPU_ONLY, Route, Stager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Outgoing = list[Buffer | Arriving]
"""The buffers of a message that is packed."""

DENSE, STRIDED, COO, COMPRESSED, QUANTIZED, META, PLACED = range(7)

COPY_MAX_NBYTES = 16_384
"""Received buffers up to this size are copied: a view would keep the whole receive batch of ZeroMQ alive."""

ALIGNMENT = 8
"""A received buffer that does not begin on this boundary is copied: kernels may expect aligned elements."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for name in sorted(dir(torch))
    if isinstance(dtype := getattr(torch, name), torch.dtype)
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COMPRESSED_LAYOUTS = {
    str(layout): layout for layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
}
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
    if len(tensors) == 1:
        return [_pack_one(tensors[0], buffers, route)]
    shared = shared_storages(tensors)
    if not shared:
        return [_pack_one(tensor, buffers, route) for tensor in tensors]
    placed: dict[int, tuple[int, int]] = {}
    table = []
    for tensor in tensors:
        key = _storage_key(tensor)
        if key in shared and tensor.numel():
            if key not in placed:
                placed[key] = (_add_span(tensor.untyped_storage(), shared[key], buffers), shared[key][0])
            table.append(strided_entry(tensor, *placed[key]))
        else:
            table.append(_pack_one(tensor, buffers, route))
    return table


def unpack(table: Sequence[Any], buffers: Sequence[Buffer], stager: Stager | None = None) -> list[torch.Tensor]:
    """The tensors that `table` and `buffers` describe; `stager` brings those to devices that arrive there.

    Raises:
        ProtocolError: an entry is malformed or names a buffer that is not there.
        DeviceError: what should arrive on a device cannot.
    """
    memory = _Memory(buffers, stager, is_shared=len(table) > 1)
    try:
        return [_UNPACKERS[entry[0]](entry, memory) for entry in table]
    except ZrpcError:
        raise
    except Exception as error:
        raise ProtocolError(f"a tensor table cannot be read: {error}") from error


# ---- sending ---------------------------------------------------------------------------------------------------


def _pack_one(tensor: torch.Tensor, buffers: Outgoing, route: Route) -> list[Any]:
    device = tensor.device
    if device.type == "cpu":
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return pack_special(tensor, lambda part: _pack_one(part.detach(), buffers, route))
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            return _dense_entry(tensor, buffers)
        return _pack_strided(tensor, buffers)
    if device.type == "meta":
        return pack_meta(tensor)
    raise route.unmapped(str(device))


def pack_meta(tensor: torch.Tensor) -> list[Any]:
    """The entry of a tensor without memory."""
    return [META, NAMES[tensor.dtype], list(tensor.shape), tensor.requires_grad, list(tensor.stride())]


def _dense_entry(tensor: torch.Tensor, buffers: Outgoing) -> list[Any]:
    nbytes = tensor.nbytes
    entry = [DENSE, NAMES[tensor.dtype], tensor.shape, tensor.requires_grad, len(buffers) if nbytes else -1]
    if not nbytes:
        return entry
    if nbytes <= INLINE_MAX_NBYTES:
        address = tensor.data_ptr()
        if not address:
            raise _without_memory()
        buffers.append(ctypes.string_at(address, nbytes))
    else:
        start = int(tensor.storage_offset()) * tensor.element_size()
        buffers.append(raw_view(tensor.untyped_storage(), start, nbytes).numpy().data)
    return entry


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
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return 0
    key: int = tensor.untyped_storage()._cdata
    return key


def shared_storages(
    tensors: Sequence[torch.Tensor], storage_key: Callable[[torch.Tensor], int] = _storage_key
) -> dict[int, Span]:
    """The storages that more than one of `tensors` sees, each with the span they see together.

    The span begins on a multiple of the largest element, so that every view keeps its alignment.
    """
    seen: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel():
            seen[storage_key(tensor)].append(tensor)
    shared = {}
    for key, views in seen.items():
        if key and len(views) > 1:
            spans = [span_of(view) for view in views]
            widest = max(view.element_size() for view in views)
            start = min(start for start, _ in spans) // widest * widest
            shared[key] = (start, max(stop for _, stop in spans))
    return shared


def pack_special(tensor: torch.Tensor, part: Callable[[torch.Tensor], list[Any]]) -> list[Any]:
    """The entry of a tensor that is sent in parts.

    Args:
        tensor: sparse or quantized.
        part: packs one of them.

    Raises:
        SerializationError: it is of a kind that cannot travel.
    """
    if tensor.is_nested:  # it has no shape
        raise _unsendable("nested")
    shape, grad = list(tensor.shape), tensor.requires_grad
    if tensor.layout is torch.sparse_coo:
        dense_dim = tensor.dense_dim()
        return [COO, shape, grad, tensor.is_coalesced(), dense_dim, part(tensor._indices()), part(tensor._values())]
    if str(tensor.layout) in _COMPRESSED_LAYOUTS:
        by_row = tensor.layout in _ROW_LAYOUTS
        compressed = tensor.crow_indices() if by_row else tensor.ccol_indices()
        plain = tensor.col_indices() if by_row else tensor.row_indices()
        return [COMPRESSED, str(tensor.layout), shape, grad, part(compressed), part(plain), part(tensor.values())]
    if tensor.is_quantized:
        return _pack_quantized(tensor, part)
    raise _unsendable(tensor.layout)


def _unsendable(layout: object) -> SerializationError:
    return SerializationError(f"a tensor of layout {layout} cannot be sent: send its parts, or tensor.to_dense()")


def _pack_quantized(tensor: torch.Tensor, part: Callable[[torch.Tensor], list[Any]]) -> list[Any]:
    head = [QUANTIZED, NAMES[tensor.dtype], list(tensor.shape)]
    integers = part(tensor.int_repr())
    if tensor.qscheme() is torch.per_tensor_affine:
        return [*head, "tensor", tensor.q_scale(), tensor.q_zero_point(), 0, integers]
    if tensor.qscheme() is torch.per_channel_affine:
        scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return [*head, "channel", part(scales), part(zero_points), tensor.q_per_channel_axis(), integers]
    raise SerializationError(f"a tensor quantized by {tensor.qscheme()} cannot be sent: send tensor.dequantize()")


# ---- receiving -------------------------------------------------------------------------------------------------


class _Memory:
    """The buffers of one message, each turned into writable memory of our own at most once.

    Args:
        buffers: what came.
        stager: brings them to devices.
        is_shared: whether more than one tensor may see the same buffer.
    """

    __slots__ = ("_buffers", "_is_shared", "_placed", "_stager", "_storages")

    def __init__(self, buffers: Sequence[Buffer], stager: Stager | None, is_shared: bool) -> None:
        self._buffers = buffers
        self._stager = stager
        self._is_shared = is_shared
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._placed: dict[tuple[str, int], torch.UntypedStorage] | None = None

    def small(self, index: int) -> bytes | None:
        """The bytes of a small buffer that only one tensor sees: to copy them into a fresh tensor is quicker."""
        buffer = None if self._is_shared else self._buffers[index]
        return buffer if type(buffer) is bytes else None

    def own(self, index: int) -> Buffer:
        """Writable bytes that nobody else sees."""
        buffer = self._buffers[index]
        if type(buffer) is bytes or len(buffer) <= COPY_MAX_NBYTES or not _can_be_taken_over(buffer):
            return bytearray(buffer)
        return buffer

    def storage(self, index: int) -> torch.UntypedStorage:
        """The same as a storage, one for all the views of this message."""
        if index < 0:
            return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        storage = self._storages.get(index)
        if storage is None:
            storage = torch.frombuffer(self.own(index), dtype=torch.uint8).untyped_storage()
            self._storages[index] = storage
        return storage

    def placed(self, index: int, device: str) -> torch.UntypedStorage:
        """The same on a device; one for all the views there of this message."""
        if self._stager is None:
            raise ProtocolError(f"a tensor for {device} came, and this worker uses no such device")
        if self._placed is None:
            self._placed = {}
        storage = self._placed.get((device, index))
        if storage is None:
            buffer = self._buffers[index] if index >= 0 else b""
            storage = self._placed[device, index] = self._stager.deliver(buffer, device).untyped_storage()
        return storage


def _can_be_taken_over(buffer: Buffer) -> bool:
    if memoryview(buffer).readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % ALIGNMENT == 0


def _unpack_dense(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, dtype, shape, requires_grad, buffer = entry
    raw = memory.small(buffer) if buffer >= 0 else b""
    if raw is not None:
        tensor = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
        _fill(tensor, raw, tensor.nbytes)
    else:
        tensor = torch.frombuffer(memory.own(buffer), dtype=DTYPES[dtype]).view(shape)
    return tensor.requires_grad_() if requires_grad else tensor


def _fill(tensor: torch.Tensor, raw: bytes, nbytes: int) -> None:
    """Give a fresh tensor, whose memory has `nbytes`, its bytes."""
    if nbytes != len(raw):
        raise ProtocolError(f"{len(raw)} bytes came for a tensor of {nbytes}")
    ctypes.memmove(tensor.data_ptr(), raw, nbytes)


def _unpack_strided(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, dtype, shape, requires_grad, buffer, strides, offset, conj, neg = entry
    raw = memory.small(buffer) if buffer >= 0 and not offset else None
    if raw is not None:
        tensor = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="cpu")
        _fill(tensor, raw, tensor.untyped_storage().nbytes())
    else:
        tensor = torch.empty(0, dtype=DTYPES[dtype], device="cpu")
        tensor.set_(memory.storage(buffer), offset, shape, strides)
    if conj:
        tensor = tensor.conj()
    if neg:
        tensor = torch._neg_view(tensor)
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_placed(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, device, inner = entry
    if device == "cpu":
        return _unpack_entry(inner, memory)
    if inner[0] not in (DENSE, STRIDED):
        raise ProtocolError(f"an entry of kind {inner[0]} is placed as a whole, and not its parts")
    _, dtype, shape, requires_grad, buffer, *view = inner
    strides, offset, conj, neg = view or (_contiguous(shape), 0, False, False)
    storage = memory.placed(buffer, device)
    tensor = torch.empty(0, dtype=DTYPES[dtype], device=storage.device)
    tensor.set_(storage, offset, shape, strides)
    if conj:
        tensor = tensor.conj()
    if neg:
        tensor = torch._neg_view(tensor)
    return tensor.requires_grad_() if requires_grad else tensor


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def _unpack_coo(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, shape, requires_grad, coalesced, _, indices, values = entry
    tensor = torch.sparse_coo_tensor(
        _unpack_entry(indices, memory),
        _unpack_entry(values, memory),
        shape,
        is_coalesced=coalesced,
        check_invariants=False,
    )
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_compressed(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, layout, shape, requires_grad, compressed, plain, values = entry
    tensor = torch.sparse_compressed_tensor(
        _unpack_entry(compressed, memory),
        _unpack_entry(plain, memory),
        _unpack_entry(values, memory),
        shape,
        layout=_COMPRESSED_LAYOUTS[layout],
        check_invariants=False,
    )
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_quantized(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, _, shape, scheme, scale, zero_point, axis, integers = entry
    raw = _unpack_entry(integers, memory).view(shape)
    if scheme == "tensor":
        return torch._make_per_tensor_quantized_tensor(raw, scale, zero_point)
    return torch._make_per_channel_quantized_tensor(
        raw, _unpack_entry(scale, memory), _unpack_entry(zero_point, memory), axis
    )


def _unpack_meta(entry: list[Any], memory: _Memory) -> torch.Tensor:
    del memory
    _, dtype, shape, requires_grad, strides = entry
    tensor = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="meta")
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_entry(entry: list[Any], memory: _Memory) -> torch.Tensor:
    return _UNPACKERS[entry[0]](entry, memory)


_UNPACKERS: dict[int, Callable[[list[Any], _Memory], torch.Tensor]] = {
    DENSE: _unpack_dense,
    STRIDED: _unpack_strided,
    COO: _unpack_coo,
    COMPRESSED: _unpack_compressed,
    QUANTIZED: _unpack_quantized,
    META: _unpack_meta,
    PLACED: _unpack_placed,
}
