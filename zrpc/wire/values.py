"""Arguments and results of torch operators, packed with msgpack: nothing in them is ever unpickled.

What an operator takes is closed: tensors, numbers, strings, None, dtypes, devices, layouts, memory formats, and lists,
tuples and dicts of those. A stream begins with `MAGIC`, a byte with which neither msgpack nor pickle begins.
"""

from __future__ import annotations

import reprlib
import struct
from contextlib import suppress
from typing import Any

import msgpack
import torch

from zrpc import remote_text
from zrpc.errors import ProtocolError
from zrpc.wire import packed_bytes
from zrpc.wire.payload import Payload

_torch: Any = torch  # parts of it are untyped
_Uninitialized: Any = _torch.nn.parameter.UninitializedTensorMixin

MAGIC = 0xC1
VALUES = bytes([MAGIC, 1])
"""What packed values begin with, unless they are something more special."""

_TENSOR, _TUPLE, _COMPLEX, _DTYPE, _DEVICE, _LAYOUT, _MEMORY_FORMAT, _SIZE = range(8)
_NAMED: dict[type, int] = {torch.dtype: _DTYPE, torch.layout: _LAYOUT, torch.memory_format: _MEMORY_FORMAT}
_CONSTANTS: dict[str, Any] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}
"""Those, by their names."""
MAX_DEPTH = 16
"""Tuples within tuples: each is a msgpack stream of its own, and to read one takes some 45 KB of the thread's stack."""
_PLAIN = None | bool | int | float | complex | str | bytes | torch.dtype | torch.device | torch.layout


def _name(place: int) -> msgpack.ExtType:
    """What stands for the tensor at `place`."""
    return msgpack.ExtType(_TENSOR, place.to_bytes(4, "little"))


_NAMES = [_name(place) for place in range(16)]
"""Those of the first ones, ready-made: `ExtType` looks at what it is given."""


class UnpackableError(TypeError):
    """The value is not one that this module carries; pickle may."""


def plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a torch operator sees of `tensor`: it has the same memory, and gradients of one are gradients of the other.

    Returns:
        None: it has no memory of its own (`has_memory`), or none yet.
    """
    cls = type(tensor)
    if cls is torch.Tensor:
        return tensor
    if not has_memory(cls) or issubclass(cls, _Uninitialized):
        return None
    if cls.__torch_function__ is _torch._C._disabled_torch_function_impl:  # nn.Parameter: as good as plain
        return tensor
    with _torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
        return tensor.as_subclass(torch.Tensor)


def plain_result(result: Any) -> Any:
    """What compiled code returned, as torch passes it on: a parameter as a plain tensor that is part of its graph."""
    if isinstance(result, torch.nn.Parameter) and has_memory(type(result)):
        with torch.enable_grad():
            return result.as_subclass(torch.Tensor)
    if type(result) in (list, tuple):
        return type(result)(map(plain_result, result))
    return {key: plain_result(item) for key, item in result.items()} if type(result) is dict else result


def has_memory(cls: type[torch.Tensor]) -> bool:
    """Whether objects of `cls` are tensors with memory of their own, and not made of others by `__torch_dispatch__`."""
    return cls.__torch_dispatch__ is _torch.Tensor.__torch_dispatch__


def is_typed(value: object) -> bool:
    """Whether torch knows the type of the value of an `RRef(value)`: its tensors then pass with their gradients.

    That is what is made of nothing but tensors and plain values, in lists, tuples and dicts of any class. A tensor of a
    subclass is no such value here if it needs no gradient, so that its class arrives.
    """
    if isinstance(value, torch.Tensor):
        return type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter) or value.requires_grad
    with suppress(RecursionError):  # it holds itself
        return _is_of_values(value)
    return False


def _is_of_values(obj: object) -> bool:
    if isinstance(obj, list | tuple):
        return all(map(_is_of_values, obj))
    if isinstance(obj, dict):
        return all(map(_is_of_values, obj.values()))
    return isinstance(obj, torch.Tensor | _PLAIN)


def pack(value: Any, prefix: bytes = VALUES, *, bare: bool = False) -> Payload:
    """Take `value` apart without pickle, into a stream that begins with `prefix`. Tensors are not copied.

    Tensors of subclasses, such as `nn.Parameter`, travel as plain tensors with their gradients, as on torch.

    Args:
        value: what to take apart.
        prefix: what the stream begins with.
        bare: take tensors only that are plain and have no attributes.

    Raises:
        UnpackableError: something in it is none of the types above.
    """
    packing = Packing(bare)
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
        return Unpacking(payload.tensors).decode(memoryview(payload.data)[len(prefix) :])
    except ProtocolError:
        raise
    except Exception as error:
        raise ProtocolError(f"packed values cannot be read: {remote_text.line(str(error))}") from error


class Packing:
    """What becomes of one value. No closures: two that call each other are a cycle, and would keep the tensors."""

    __slots__ = ("_bare", "_depth", "_places", "tensors")

    def __init__(self, bare: bool = False) -> None:
        self._bare = bare
        self._depth = 0
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}  # a tensor that is there twice travels once, and arrives as one

    def encode(self, obj: Any) -> bytes:
        """`obj` as bytes; its tensors are in `tensors` then."""
        packed: bytes = msgpack.packb(obj, default=self.extend, strict_types=True)
        return packed

    def extend(self, obj: Any) -> msgpack.ExtType:
        """What stands for `obj`, which msgpack does not know."""
        cls = type(obj)
        if cls is torch.Tensor and not (self._bare and obj.__dict__):
            place = self._places.setdefault(id(obj), len(self.tensors))
            if place == len(self.tensors):
                self.tensors.append(obj)
            return _NAMES[place] if place < len(_NAMES) else _name(place)
        if cls is tuple or cls is torch.Size:
            if self._depth == MAX_DEPTH:
                raise UnpackableError(f"tuples lie in each other {MAX_DEPTH} deep")
            self._depth += 1
            packed = self.encode(list(obj))
            self._depth -= 1
            return msgpack.ExtType(_TUPLE if cls is tuple else _SIZE, packed)
        if cls is complex:
            return msgpack.ExtType(_COMPLEX, struct.pack("<dd", obj.real, obj.imag))
        if cls is torch.device:
            return msgpack.ExtType(_DEVICE, str(obj).encode())
        if cls in _NAMED:
            return msgpack.ExtType(_NAMED[cls], str(obj).removeprefix("torch.").encode())
        if isinstance(obj, torch.Tensor) and not self._bare:
            sent = plain(obj)
            if sent is not None:
                place = self._places.setdefault(id(obj), len(self.tensors))
                if place == len(self.tensors):
                    self.tensors.append(sent)
                return _name(place)
        raise UnpackableError(f"a {cls.__module__}.{cls.__qualname__} is not an operator's argument")


class Unpacking:
    """The way back."""

    __slots__ = ("_depth", "_tensors")

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._depth = 0

    def decode(self, raw: bytes | memoryview) -> Any:
        """What `Packing.encode` made bytes of."""
        return packed_bytes.unpack_values(raw, self.restore)

    def restore(self, code: int, raw: bytes) -> Any:
        """What `Packing.extend` took apart."""
        if code == _TENSOR:
            return self._tensors[int.from_bytes(raw, "little")]
        if code == _TUPLE:
            return tuple(self._items(raw))
        if code == _SIZE:
            return torch.Size(self._items(raw))
        if code == _COMPLEX:
            return complex(*struct.unpack("<dd", raw))
        if code == _DEVICE:
            return torch.device(raw.decode())
        if code in (_DTYPE, _LAYOUT, _MEMORY_FORMAT):
            return torch_constant(raw.decode())
        raise ProtocolError(f"packed values have an unknown type code {code}")

    def _items(self, raw: bytes) -> list[Any]:
        """What is in a tuple."""
        if self._depth == MAX_DEPTH:
            raise ProtocolError(f"tuples lie in each other more than {MAX_DEPTH} deep")
        self._depth += 1
        items = self.decode(raw)
        self._depth -= 1
        if type(items) is not list:
            raise ProtocolError(f"a tuple holds {reprlib.repr(items)}")
        return items


def torch_constant(name: str) -> Any:
    """The dtype, layout or memory format `torch.NAME`.

    Raises:
        ProtocolError: there is none.
    """
    value = vars(torch).get(name)  # `getattr` would import what torch loads when it is asked for
    if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        raise ProtocolError(f"torch.{reprlib.repr(name)} is not a dtype, layout or memory format")
    return value
