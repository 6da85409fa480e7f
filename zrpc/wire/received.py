"""Tensors that came: made of table entries and buffers (`zrpc.wire.tensors` says what those are)."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import torch

from zrpc import remote_text
from zrpc.errors import ProtocolError, ZrpcError
from zrpc.wire.bounds import check_parts, check_sparse, hollow, numel_of, packed_nbytes, span_of
from zrpc.wire.tensors import (
    COMPRESSED,
    COMPRESSED_LAYOUTS,
    COO,
    DENSE,
    DTYPES,
    INTEGERS,
    META,
    NAMES,
    NESTED,
    PACKED,
    PLACED,
    QUANTIZED,
    STRIDED,
    contiguous_strides,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.wire.envelope import Buffer
    from zrpc.wire.route import Stager

_torch: Any = torch  # parts of it are untyped
_QUANTIZED = {NAMES[dtype]: dtype for dtype in (*INTEGERS, *PACKED)}

COPY_MAX_NBYTES = 16_384
"""Received buffers up to this size are copied: a view would keep the whole receive batch of ZeroMQ alive."""

ALIGNMENT = 8
"""A received buffer that does not begin on this boundary is copied: kernels may expect aligned elements."""


def unpack(table: Sequence[Any], buffers: list[Buffer], stager: Stager | None = None) -> list[torch.Tensor]:
    """The tensors that `table` and `buffers` describe; `stager` brings those to devices that arrive there.

    What was brought there is taken out of `buffers`: it should be held no longer than the stager holds it.

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
        raise ProtocolError(f"a tensor table cannot be read: {remote_text.line(str(error))}") from error


class _Memory:
    """The buffers of one message, each turned into writable memory of our own at most once.

    Args:
        buffers: what came.
        stager: brings them to devices.
        is_shared: whether more than one tensor may see the same buffer.
    """

    __slots__ = ("_buffers", "_is_shared", "_placed", "_stager", "_storages", "_taken")

    def __init__(self, buffers: list[Buffer], stager: Stager | None, is_shared: bool) -> None:
        self._buffers = buffers
        self._stager = stager
        self._is_shared = is_shared
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._placed: dict[tuple[str, int], torch.UntypedStorage] | None = None
        self._taken: set[int] = set()

    def small(self, index: int) -> bytes | None:
        """The bytes of a small buffer that only one tensor sees: to copy them into a fresh tensor is quicker."""
        buffer = None if self._is_shared else self._buffers[index]
        return buffer if type(buffer) is bytes else None

    def own(self, index: int) -> Buffer:
        """Writable bytes that nobody else sees. Each buffer can be had once: else a table could multiply a message."""
        buffer = self._buffers[index]
        if index in self._taken:
            raise ProtocolError(f"two tensors say that buffer {index} is theirs alone")
        self._taken.add(index)
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
            if index >= 0:
                self._buffers[index] = b""
        return storage


def _can_be_taken_over(buffer: Buffer) -> bool:
    if memoryview(buffer).readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % ALIGNMENT == 0


def _unpack_dense(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, dtype, shape, requires_grad, buffer = entry
    if buffer < 0:
        if numel_of(shape):
            raise ProtocolError(f"no memory came for a tensor of {numel_of(shape)} elements")
        tensor = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
    else:
        tensor = torch.frombuffer(memory.own(buffer), dtype=DTYPES[dtype])
        if len(shape) != 1 or shape[0] != tensor.shape[0]:
            _reshape(tensor, shape)
    return tensor.requires_grad_() if requires_grad else tensor


def _reshape(tensor: torch.Tensor, shape: list[int]) -> None:
    """Give a fresh tensor another shape of as many elements. A view would not do: one that is made in no_grad mode must
    not be written to in grad mode."""
    if math.prod(shape) != tensor.shape[0]:  # torch would make its memory larger
        raise ProtocolError(f"{tensor.nbytes} bytes came for a tensor of {math.prod(shape) * tensor.itemsize}")
    if shape:
        tensor.resize_(*shape)  # a list takes half as long again
    else:
        tensor.resize_(())


def _unpack_strided(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, name, shape, requires_grad, buffer, strides, offset, conj, neg = entry
    dtype = DTYPES[name]
    raw = memory.small(buffer) if buffer >= 0 and not offset else None
    if raw is not None:
        nbytes = span_of(shape, strides, 0, len(raw) // dtype.itemsize) * dtype.itemsize
        if nbytes != len(raw):
            raise ProtocolError(f"{len(raw)} bytes came for a tensor of {nbytes}")
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        ctypes.memmove(tensor.data_ptr(), raw, nbytes)
    else:
        tensor = _view(memory.storage(buffer), dtype, shape, strides, offset)
    return _finished(tensor, requires_grad, conj, neg)


def _view(
    storage: torch.UntypedStorage, dtype: torch.dtype, shape: list[int], strides: Sequence[int], offset: int
) -> torch.Tensor:
    """What so much of `storage` is as a tensor. torch would make the storage larger where it does not suffice."""
    span_of(shape, strides, offset, storage.nbytes() // dtype.itemsize)
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, strides)


def _finished(tensor: torch.Tensor, requires_grad: bool, conj: bool, neg: bool) -> torch.Tensor:
    if conj:
        tensor = tensor.conj().detach()  # see `_reshape`
    if neg:
        tensor = torch._neg_view(tensor).detach()
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_placed(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, device, inner = entry
    if inner[0] not in (DENSE, STRIDED):
        raise ProtocolError(f"an entry of kind {inner[0]} is placed as a whole, and not its parts")
    if device == "cpu":
        return _unpack_entry(inner, memory)
    _, dtype, shape, requires_grad, buffer, *view = inner
    numel_of(shape)
    strides, offset, conj, neg = view or (contiguous_strides(shape), 0, False, False)
    tensor = _view(memory.placed(buffer, device), DTYPES[dtype], shape, strides, offset)
    return _finished(tensor, requires_grad, conj, neg)


def _unpack_part(entry: list[Any], memory: _Memory) -> torch.Tensor:
    """What others are made of: a tensor that has plain memory, or none (META)."""
    if entry[0] not in _PART_KINDS:
        raise ProtocolError(f"an entry of kind {entry[0]} is part of another")
    return _unpack_entry(entry, memory)


def _unpack_coo(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, shape, requires_grad, coalesced, _, indices, values = entry
    numel_of(shape)
    indices, values = _unpack_part(indices, memory), _unpack_part(values, memory)
    tensor = torch.sparse_coo_tensor(
        indices, values, shape, is_coalesced=bool(coalesced), check_invariants=check_sparse(indices, values)
    )
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_compressed(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, layout, shape, requires_grad, compressed, plain, values = entry
    numel_of(shape)
    compressed, plain, values = [_unpack_part(part, memory) for part in (compressed, plain, values)]
    is_checked = check_sparse(plain, values) and check_sparse(compressed, values)
    tensor = torch.sparse_compressed_tensor(
        compressed, plain, values, shape, layout=COMPRESSED_LAYOUTS[layout], check_invariants=is_checked
    )
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_quantized(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, name, shape, scheme, scale, zero_point, axis, integers = entry
    raw, dtype = _unpack_part(integers, memory), _QUANTIZED[name]
    numel_of(shape)
    if raw.dtype is not INTEGERS.get(dtype, torch.uint8):
        raise ProtocolError(f"a tensor of {dtype} is made of {raw.dtype}")
    if dtype in PACKED:
        nbytes, strides = packed_nbytes(name, shape), contiguous_strides(shape)
        if raw.dim() != 1 or not raw.is_contiguous() or raw.nbytes != nbytes:
            raise ProtocolError(f"{raw.nbytes} bytes came for a tensor of {nbytes}")
    elif list(raw.shape) != shape:
        raise ProtocolError(f"a quantized tensor of other sizes is made of integers of shape {list(raw.shape)}")
    else:
        strides = raw.stride()
    if scheme == "tensor":
        made = _torch._empty_affine_quantized(
            hollow(shape, -1), scale=float(scale), zero_point=zero_point, dtype=dtype, device=raw.device
        )
    else:
        scales, zero_points = _unpack_part(scale, memory), _unpack_part(zero_point, memory)
        if type(axis) is not int or not 0 <= axis < len(shape):
            raise ProtocolError(f"a tensor of {len(shape)} dimensions is quantized along one that it lacks")
        check_parts("quantized", (shape[axis],), tuple(scales.shape), tuple(zero_points.shape))
        made = _torch._empty_per_channel_affine_quantized(
            hollow(shape, axis), scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=raw.device
        )
    tensor: torch.Tensor = made.set_(raw.untyped_storage(), raw.storage_offset(), shape, strides)
    return tensor


def _unpack_nested(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, requires_grad, values, sizes, strides, offsets = entry
    raw = _unpack_part(values, memory)
    if raw.dim() != 1 or not raw.is_contiguous() or raw.is_meta:
        raise ProtocolError("a nested tensor is made of one that is not one row of memory")
    check_parts("nested", len(sizes), len(strides), len(offsets))
    for size, stride, offset in zip(sizes, strides, offsets, strict=True):
        span_of(size, stride, offset, raw.numel())  # torch does not look
    if raw.storage_offset():  # nor does it look where that memory begins
        raw = raw.clone()
    parts = [torch.tensor(part, dtype=torch.int64, device="cpu") for part in (sizes, strides, offsets)]
    if offsets:
        tensor: torch.Tensor = _torch._nested_view_from_buffer(raw, *parts).detach()  # see `_reshape`
    else:
        tensor = _torch.nested.nested_tensor([], dtype=raw.dtype, device=raw.device)
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_meta(entry: list[Any], memory: _Memory) -> torch.Tensor:
    del memory
    _, dtype, shape, requires_grad, strides, conj, neg = entry
    span_of(shape, strides, 0)
    tensor = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="meta")
    return _finished(tensor, requires_grad, conj, neg)


def _unpack_entry(entry: list[Any], memory: _Memory) -> torch.Tensor:
    return _UNPACKERS[entry[0]](entry, memory)


_PART_KINDS = (DENSE, STRIDED, META, PLACED)
_UNPACKERS: dict[int, Callable[[list[Any], _Memory], torch.Tensor]] = {
    DENSE: _unpack_dense,
    STRIDED: _unpack_strided,
    COO: _unpack_coo,
    COMPRESSED: _unpack_compressed,
    QUANTIZED: _unpack_quantized,
    META: _unpack_meta,
    PLACED: _unpack_placed,
    NESTED: _unpack_nested,
}
