"""What a value may be made of where nothing is pickled: `zrpc.wire.values`, and what is `register`ed here.

What: numpy arrays and scalars, exposed functions and classes and torch's own optimizers (as their names), types of the
values of RRefs (likewise), and what floors above register: RRefs, above all. An exposed function or class arrives as
the one that is exposed under that name on the receiver. Arrays travel beside the stream, and are not copied where they
are in one piece.

Invariants: to unpack a value imports and calls nothing that the value names. Threads: any; `register` is called as
modules are imported. Failure: `values.UnpackableError` for what is not carried; whatever unpacking a damaged stream
raises is turned into `ProtocolError` by `unpack`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import torch

from zrpc.errors import NotAllowedError, ProtocolError
from zrpc.exposed import registry
from zrpc.functions import ASYNC_ATTRIBUTE
from zrpc.ids import WorkerInfo
from zrpc.wire import values
from zrpc.wire.allowed_names import OPTIMIZERS
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable

    Pack = Callable[[Any, "Packing"], bytes]
    Unpack = Callable[[bytes, "Unpacking"], Any]

_ARRAY, _SCALAR, _NAMED, _TYPE, _WORKER = range(16, 21)
RREF, KEY, LOST, REMOTE_MODULE = range(32, 36)
"""Codes of what floors above register."""

CARRIED = (
    "None, numbers, strings, bytes, lists, tuples, dicts, tensors, numpy arrays, dtypes, devices, RRefs, WorkerInfos, "
    "and functions and classes marked with @zrpc.expose"
)

_packers: dict[type, tuple[int, Pack]] = {}
_unpackers: dict[int, Unpack] = {}


def register(cls: type, code: int, pack: Pack, unpack: Unpack) -> None:
    """From now on objects whose class is exactly `cls` are carried: as what `pack` makes of them, under `code`.

    Raises:
        ValueError: the code is taken.
    """
    if code in _unpackers:
        raise ValueError(f"the code {code} is taken")
    _packers[cls] = code, pack
    _unpackers[code] = unpack


def register_parts(cls: type, code: int, parts: Callable[[Any], tuple[Any, ...]], make: Callable[..., Any]) -> None:
    """As `register`, for objects that `make(*parts(obj))` makes again, of parts that are carried."""
    register(
        cls,
        code,
        lambda obj, packing: packing.encode(parts(obj)),
        lambda raw, unpacking: make(*unpacking.decode(raw)),
    )


class Packing(values.Packing):
    """Takes one value apart.

    Attributes:
        payload: takes the buffers and passengers; its stream and tensors are set at the end.
    """

    __slots__ = ("payload",)

    def __init__(self) -> None:
        super().__init__()
        self.payload = Payload(buffers=[])

    def extend(self, obj: Any) -> msgpack.ExtType:
        """See `values.Packing.extend`."""
        packer = _packers.get(type(obj))
        if packer is not None:
            code, pack = packer
            return msgpack.ExtType(code, pack(obj, self))
        if isinstance(obj, np.generic):
            return msgpack.ExtType(_SCALAR, _pack_array(np.asarray(obj), self))
        if callable(obj) and (name := name_of(obj)) is not None:
            return msgpack.ExtType(_NAMED, self.encode(list(name)))
        return super().extend(obj)

    def set_aside(self, buffer: memoryview) -> int:
        """Let `buffer` travel beside the stream; its number."""
        buffers: Any = self.payload.buffers
        buffers.append(buffer)
        return len(buffers) - 1


class Unpacking(values.Unpacking):
    """The way back.

    Attributes:
        payload: what came.
        refusal: makes the error that says that what is described is refused.
    """

    __slots__ = ("payload", "refusal")

    def __init__(self, payload: Payload, refusal: Callable[[str], NotAllowedError]) -> None:
        super().__init__(payload.tensors)
        self.payload = payload
        self.refusal = refusal

    def restore(self, code: int, raw: bytes) -> Any:
        """See `values.Unpacking.restore`."""
        unpack = _unpackers.get(code)
        return super().restore(code, raw) if unpack is None else unpack(raw, self)


# ---- what is carried -------------------------------------------------------------------------------------------


def name_of(target: Any) -> tuple[str, str] | None:
    """The name of something that is exposed, or of an optimizer of torch."""
    name = registry.name_of(target)
    if name is None and isinstance(target, type):
        own = target.__module__, target.__qualname__
        return own if own in OPTIMIZERS and _optimizer(own) is target else None
    return name


def _optimizer(name: tuple[Any, Any]) -> Any:
    """torch's optimizer of that name, which torch has imported."""
    return next((one for one in vars(torch.optim).values() if _is_named(one, name)), None)


def _is_named(target: Any, name: tuple[Any, Any]) -> bool:
    return isinstance(target, type) and (target.__module__, target.__qualname__) == name


def _unpack_named(raw: bytes, unpacking: Unpacking) -> Any:
    module, name = unpacking.decode(raw)
    found = registry.find(module, name)
    if found is None and (module, name) in OPTIMIZERS:
        found = _optimizer((module, name))
    if found is None:
        raise unpacking.refusal(f"{module}.{name}")
    return found


def _pack_array(array: np.ndarray[Any, Any], packing: Packing) -> bytes:
    if array.dtype.hasobject:
        raise values.UnpackableError(f"an array of {array.dtype}, which holds Python objects, is not carried")
    is_transposed = array.flags.f_contiguous and not array.flags.c_contiguous
    laid_out = np.ascontiguousarray(array.T if is_transposed else array)
    seen: Any = laid_out.reshape(-1).view(np.uint8) if laid_out.nbytes else b""
    number = packing.set_aside(memoryview(seen))
    description: Any = np.lib.format.dtype_to_descr(array.dtype)
    return packing.encode([description, list(array.shape), is_transposed, number])


def _unpack_array(raw: bytes, unpacking: Unpacking) -> Any:
    description, shape, is_transposed, number = unpacking.decode(raw)
    dtype = np.lib.format.descr_to_dtype(description)
    if dtype.hasobject or not isinstance(shape, list) or not isinstance(number, int) or number < 0:
        raise ProtocolError(f"an array of {dtype} and shape {shape!r} cannot be read")
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise ProtocolError(f"an array has the shape {shape!r}")
    if 0 in shape:
        return np.empty(shape, dtype)
    buffer = unpacking.payload.buffers[number]
    memory = bytearray(buffer) if memoryview(buffer).readonly else buffer
    made = np.frombuffer(memory, dtype)
    return made.reshape(shape[::-1]).T if is_transposed else made.reshape(shape)


def _unpack_scalar(raw: bytes, unpacking: Unpacking) -> Any:
    return _unpack_array(raw, unpacking)[()]


class ValueType:
    """What an owner tells of the type of a value: its name, and which exposed methods are asynchronous."""

    __slots__ = ("async_methods", "module", "name")

    def __init__(self, cls: type) -> None:
        self.module, self.name = str(cls.__module__), str(cls.__qualname__)
        self.async_methods = [name for name in dir(cls) if registry.is_method(cls, name) and _is_async(cls, name)]


def _is_async(cls: type, name: str) -> bool:
    return hasattr(getattr(cls, name), ASYNC_ATTRIBUTE)


class _UnknownType(type):
    """The class of classes that stand for those of another worker's values: any method may be there."""

    def __getattr__(cls, name: str) -> None:
        return None


def _pack_type(described: ValueType, packing: Packing) -> bytes:
    return packing.encode([described.module, described.name, described.async_methods])


def _unpack_type(raw: bytes, unpacking: Unpacking) -> type:
    """The class, if it is exposed here too or one of those that values are of, or what stands for it."""
    module, name, async_methods = unpacking.decode(raw)
    found = registry.find(module, name)
    if isinstance(found, type):
        return found
    known = next((cls for cls in _KNOWN_TYPES if _is_named(cls, (module, name))), None)
    if known is not None:
        return known
    marked: Any = {str(method): _AsyncMark() for method in async_methods if not str(method).startswith("__")}
    return _UnknownType(str(name), (), marked)


class _AsyncMark:
    """Stands for an asynchronous method of a class that is not known here."""


setattr(_AsyncMark, ASYNC_ATTRIBUTE, True)

_KNOWN_TYPES = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, torch.Tensor, torch.nn.Parameter)


register_parts(WorkerInfo, _WORKER, lambda worker: (worker.name, worker.id, worker.incarnation), WorkerInfo)
register(np.ndarray, _ARRAY, _pack_array, _unpack_array)
register(ValueType, _TYPE, _pack_type, _unpack_type)
_unpackers[_SCALAR] = _unpack_scalar
_unpackers[_NAMED] = _unpack_named


# ---- values ----------------------------------------------------------------------------------------------------


def pack(value: Any, prefix: bytes) -> Payload:
    """Take `value` apart, into a stream that begins with `prefix`.

    Raises:
        UnpackableError: something in it is not carried.
    """
    packing = Packing()
    payload = packing.payload
    try:
        payload.data = prefix + packing.encode(value)
    except (OverflowError, ValueError, RecursionError) as error:
        raise values.UnpackableError(str(error)) from error
    payload.tensors = packing.tensors
    return payload


def unpack(payload: Payload, prefix: bytes, refusal: Callable[[str], NotAllowedError]) -> Any:
    """Put a value together again that `pack` took apart with the same `prefix`.

    Raises:
        NotAllowedError: the stream is another one, or names what is not exposed here; as `refusal` makes it.
        ProtocolError: the stream is damaged.
    """
    if payload.data[: len(prefix)] != prefix:
        raise refusal("a pickled or unknown value")
    try:
        return Unpacking(payload, refusal).decode(memoryview(payload.data)[len(prefix) :])
    except (ProtocolError, NotAllowedError):
        raise
    except Exception as error:
        raise ProtocolError(f"packed values cannot be read: {error}") from error
