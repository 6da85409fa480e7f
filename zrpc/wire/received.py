"""Tensors that came: made of table entries and buffers (`zrpc.wire.tensors` says what those are)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import ProtocolError, ZrpcError
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
        raise ProtocolError(f"a tensor table cannot be read: {error}") from error


class _Memory:
    """The buffers of one message, each turned into writable memory of our own at most once.

    Args:
        buffers: what came.
        stager: brings them to devices.
        is_shared: whether more than one tensor may see the same buffer.
    """

    __slots__ = ("_buffers", "_is_shared", "_placed", "_stager", "_storages")

    def __init__(self, buffers: list[Buffer], stager: Stager | None, is_shared: bool) -> None:
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
        tensor = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
    else:
        tensor = torch.frombuffer(memory.own(buffer), dtype=DTYPES[dtype])
        if len(shape) != 1 or shape[0] != tensor.shape[0]:
            _reshape(tensor, shape)
    return tensor.requires_grad_() if requires_grad else tensor


def _reshape(tensor: torch.Tensor, shape: list[int]) -> None:
    """Give a fresh tensor another shape of as many elements. A view would not do: one that is made in no_grad mode must
    not be written to in grad mode."""
    nbytes = tensor.nbytes
    if shape:
        tensor.resize_(*shape)  # a list takes half as long again
    else:
        tensor.resize_(())
    if tensor.nbytes != nbytes:
        raise ProtocolError(f"{nbytes} bytes came for a tensor of {tensor.nbytes}")


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
    return _finished(tensor, requires_grad, conj, neg)


def _finished(tensor: torch.Tensor, requires_grad: bool, conj: bool, neg: bool) -> torch.Tensor:
    if conj:
        tensor = tensor.conj().detach()  # see `_reshape`
    if neg:
        tensor = torch._neg_view(tensor).detach()
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_placed(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, device, inner = entry
    if device == "cpu":
        return _unpack_entry(inner, memory)
    if inner[0] not in (DENSE, STRIDED):
        raise ProtocolError(f"an entry of kind {inner[0]} is placed as a whole, and not its parts")
    _, dtype, shape, requires_grad, buffer, *view = inner
    strides, offset, conj, neg = view or (contiguous_strides(shape), 0, False, False)
    storage = memory.placed(buffer, device)
    tensor = torch.empty(0, dtype=DTYPES[dtype], device=storage.device)
    tensor.set_(storage, offset, shape, strides)
    return _finished(tensor, requires_grad, conj, neg)


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
        layout=COMPRESSED_LAYOUTS[layout],
        check_invariants=False,
    )
    return tensor.requires_grad_() if requires_grad else tensor


def _unpack_quantized(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, name, shape, scheme, scale, zero_point, axis, integers = entry
    raw, dtype = _unpack_entry(integers, memory), _QUANTIZED[name]
    if raw.dtype is not INTEGERS.get(dtype, torch.uint8):
        raise ProtocolError(f"a tensor of {dtype} is made of {raw.dtype}")
    if scheme == "tensor":
        made = _torch._empty_affine_quantized(shape, scale=scale, zero_point=zero_point, dtype=dtype, device=raw.device)
    else:
        scales, zero_points = _unpack_entry(scale, memory), _unpack_entry(zero_point, memory)
        made = _torch._empty_per_channel_affine_quantized(
            shape, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=raw.device
        )
    strides = contiguous_strides(shape) if dtype in PACKED else raw.stride()
    if dtype in PACKED and raw.nbytes != made.untyped_storage().nbytes():
        raise ProtocolError(f"{raw.nbytes} bytes came for a tensor of {made.untyped_storage().nbytes()}")
    tensor: torch.Tensor = made.set_(raw.untyped_storage(), raw.storage_offset(), shape, strides)
    return tensor


def _unpack_nested(entry: list[Any], memory: _Memory) -> torch.Tensor:
    _, requires_grad, values, sizes, strides, offsets = entry
    raw = _unpack_entry(values, memory)
    if raw.dim() != 1 or len({len(sizes), len(strides), len(offsets)}) != 1:
        raise ProtocolError("the parts of a nested tensor do not fit each other")
    for size, stride, offset in zip(sizes, strides, offsets, strict=True):
        _check_bounds(raw.numel(), size, stride, offset)
    parts = [torch.tensor(part, dtype=torch.int64, device="cpu") for part in (sizes, strides, offsets)]
    if offsets:
        tensor: torch.Tensor = _torch._nested_view_from_buffer(raw, *parts).detach()  # see `_reshape`
    else:
        tensor = _torch.nested.nested_tensor([], dtype=raw.dtype, device=raw.device)
    return tensor.requires_grad_() if requires_grad else tensor


def _check_bounds(count: int, sizes: list[int], strides: list[int], offset: int) -> None:
    """Raise `ProtocolError` unless such a view of `count` elements sees none but these: torch does not look."""
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min([offset, *sizes, *strides]) < 0 or (0 not in sizes and last >= count):
        raise ProtocolError(f"a nested tensor sees more than its {count} elements")


def _unpack_meta(entry: list[Any], memory: _Memory) -> torch.Tensor:
    del memory
    _, dtype, shape, requires_grad, strides, conj, neg = entry
    tensor = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="meta")
    return _finished(tensor, requires_grad, conj, neg)


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
    NESTED: _unpack_nested,
}
