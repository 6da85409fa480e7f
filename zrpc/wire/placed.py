"""Tensors that device maps are about: those on devices, and those that arrive on one.

They travel as others do (`zrpc.wire.tensors`), with three differences. The bytes of a tensor on a device are brought
to the host by a `Stager` and may still be on their way when the message is sealed. What arrives on a device of the
receiver is wrapped into a PLACED entry, whose inner entry is DENSE or STRIDED. And of tensors without plain memory
(sparse, quantized) each part is placed for itself.

Storages are shared on arrival as they are between tensors of the CPU: per device that they arrive on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zrpc.wire import tensors as codec
from zrpc.wire.tensors import DENSE, PLACED, Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from zrpc.wire.route import Route
    from zrpc.wire.tensors import Outgoing

CPU = "cpu"


def pack(tensors: Sequence[torch.Tensor], buffers: Outgoing, route: Route) -> list[Any]:
    """As `zrpc.wire.tensors.pack`, for a peer with a device map.

    Raises:
        SerializationError: a tensor cannot travel, or is on a device that is not mapped.
        DeviceError: a device does not take the work.
    """
    shared = codec.shared_storages(tensors, _storage_key) if len(tensors) > 1 else {}
    packer = _Packer(buffers, route, shared)
    try:
        return [packer.entry(tensor) for tensor in tensors]
    except RuntimeError as error:
        codec.refuse_wrapped(tensors, error)
        raise


def _storage_key(tensor: torch.Tensor) -> int:
    """Which storage a plain tensor sees; 0 for every other tensor."""
    if tensor.device.type == "meta" or codec.is_special(tensor):
        return 0
    key: int = tensor.untyped_storage()._cdata
    return key


class _Packer:
    """The packing of one message.

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
        if tensor.device.type == "meta":
            return codec.pack_meta(tensor)
        if codec.is_special(tensor):
            return codec.pack_special(tensor, lambda part: self.entry(part.detach()))
        device = str(tensor.device)
        target = self._route.devices.get(device)
        if target is None:
            if device != CPU:
                raise self._route.unmapped(device)
            target = CPU
        inner = self._inner(tensor, device)
        return inner if target == CPU else [PLACED, target, inner]

    def _inner(self, tensor: torch.Tensor, device: str) -> list[Any]:
        key = _storage_key(tensor)
        span = self._shared.get(key)
        if span is not None and tensor.numel():
            if key not in self._placed:
                self._placed[key] = self._add(tensor.untyped_storage(), span, device)
            return codec.strided_entry(tensor, self._placed[key], span[0])
        if not codec.is_dense(tensor):
            span = codec.span_of(tensor)
            if not codec.is_gathered(tensor, span):
                return codec.strided_entry(tensor, self._add(tensor.untyped_storage(), span, device), span[0])
            tensor = codec.gathered(tensor)
        start = int(tensor.storage_offset()) * tensor.element_size()
        buffer = self._add(tensor.untyped_storage(), (start, start + tensor.nbytes), device)
        return [DENSE, codec.NAMES[tensor.dtype], tensor.shape, tensor.requires_grad, buffer]

    def _add(self, storage: torch.UntypedStorage, span: Span, device: str) -> int:
        start, stop = span
        if start == stop:
            return -1
        raw = codec.raw_view(storage, start, stop - start, storage.device)
        if device == CPU:
            self._buffers.append(raw.numpy().data)
        else:
            stager = self._route.stager
            if stager is None:
                raise self._route.unmapped(device)
            self._buffers.append(stager.fetch(raw, device))
        return len(self._buffers) - 1
