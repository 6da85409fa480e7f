"""Arguments and results of torch operators, packed with msgpack: nothing in them is ever unpickled.

What an operator takes is closed: tensors, numbers, strings, None, dtypes, devices, layouts, memory formats, and lists,
tuples and dicts of those. A stream begins with `MAGIC`, a byte with which neither msgpack nor pickle begins.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import torch

from zrpc.errors import ProtocolError
from zrpc.wire.payload import Payload

MAGIC = 0xC1
VALUES = bytes([MAGIC, 1])
"""What packed values begin with, unless they are something more special."""

_TENSOR, _TUPLE, _COMPLEX, _DTYPE, _DEVICE, _LAYOUT, _MEMORY_FORMAT, _SIZE = range(8)
_NAMED: dict[type, int] = {torch.dtype: _DTYPE, torch.layout: _LAYOUT, torch.memory_format: _MEMORY_FORMAT}


def _name(place: int) -> msgpack.ExtType:
    """What stands for the tensor at `place`."""
    return msgpack.ExtType(_TENSOR, place.to_bytes(4, "little"))


_NAMES = [_name(place) for place in range(16)]
"""Those of the first ones, ready-made: `ExtType` looks at what it is given."""


class UnpackableError(TypeError):
    """The value is not one that this module carries; pickle may."""


def pack(value: Any, prefix: bytes = VALUES) -> Payload:
    """Take `value` apart without pickle, into a stream that begins with `prefix`. Tensors are not copied.

    Raises:
        UnpackableError: something in it is none of the types above.
    """
    packing = _Packing()
    try:
        return Payload(prefix + packing.encode(value), packing.tensors)
    except (OverflowError, ValueError, RecursionError) as error:
        raise UnpackableError(str(error)) from error


def unpack(payload: Payload, prefix: bytes = VALUES) -> Any:
    """Put a value together again that `pack` took apart with the same `prefix`.

    Raises:
        ProtocolError: the stream is damaged.
    """
    try:
        if payload.data[: len(prefix)] != prefix:
            raise ProtocolError(f"packed values begin with {bytes(payload.data[:2])!r}")
        return _Unpacking(payload.tensors).decode(memoryview(payload.data)[len(prefix) :])
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"packed values cannot be read: {error}") from error


class _Packing:
    """What becomes of one value. No closures: two that call each other are a cycle, and would keep the tensors."""

    __slots__ = ("_places", "tensors")

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}  # a tensor that is there twice travels once, and arrives as one

    def encode(self, obj: Any) -> bytes:
        packed: bytes = msgpack.packb(obj, default=self._extend, strict_types=True)
        return packed

    def _extend(self, obj: Any) -> msgpack.ExtType:
        cls = type(obj)
        if cls is torch.Tensor:
            place = self._places.setdefault(id(obj), len(self.tensors))
            if place == len(self.tensors):
                self.tensors.append(obj)
            return _NAMES[place] if place < len(_NAMES) else _name(place)
        if cls is tuple or cls is torch.Size:
            return msgpack.ExtType(_TUPLE if cls is tuple else _SIZE, self.encode(list(obj)))
        if cls is complex:
            return msgpack.ExtType(_COMPLEX, struct.pack("<dd", obj.real, obj.imag))
        if cls is torch.device:
            return msgpack.ExtType(_DEVICE, str(obj).encode())
        if cls in _NAMED:
            return msgpack.ExtType(_NAMED[cls], str(obj).removeprefix("torch.").encode())
        raise UnpackableError(f"a {cls.__module__}.{cls.__qualname__} is not an operator's argument")


class _Unpacking:
    """The way back."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def decode(self, raw: bytes | memoryview) -> Any:
        return msgpack.unpackb(raw, ext_hook=self._restore, strict_map_key=False)

    def _restore(self, code: int, raw: bytes) -> Any:
        if code == _TENSOR:
            return self._tensors[int.from_bytes(raw, "little")]
        if code == _TUPLE:
            return tuple(self.decode(raw))
        if code == _SIZE:
            return torch.Size(self.decode(raw))
        if code == _COMPLEX:
            return complex(*struct.unpack("<dd", raw))
        if code == _DEVICE:
            return torch.device(raw.decode())
        if code in (_DTYPE, _LAYOUT, _MEMORY_FORMAT):
            return _torch_constant(raw.decode())
        raise ProtocolError(f"packed values have an unknown type code {code}")


def _torch_constant(name: str) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        raise ProtocolError(f"torch.{name} is not a dtype, layout or memory format")
    return value
