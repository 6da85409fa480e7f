"""Pickle with tensors and large buffers set aside.

Plain `torch.Tensor` objects leave the stream for the payload's tensor table (subclasses, `nn.Parameter` among them,
pickle by their own rules, which bring their data to the table in turn). Objects that offer PEP 574 buffers, numpy
arrays above all, leave their memory in the payload's buffers. Other classes are added with `register_reducer`.

What is usual is not pickled at all, which takes two to three times as long: a result that is nothing, one tensor or a
plain value, and a call of a module's function with nothing but tensors and plain values.
"""

from __future__ import annotations

import copyreg
import importlib
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import ProtocolError, SerializationError
from zrpc.exception_text import describe, is_interrupt, repr_of, text_of
from zrpc.wire import values
from zrpc.wire.payload import Passenger, Payload

if TYPE_CHECKING:
    from zrpc.wire.envelope import Buffer

_PROTOCOL = 5
_NONE = b""
_ONE_TENSOR = bytes([values.MAGIC, 0])
_CALL = bytes([values.MAGIC, 2])
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
"""What is equal to its copy, has no parts, and may be packed, within msgpack's bounds."""
_PLAIN_OR_TENSOR = _PLAIN | {torch.Tensor}

Reduced = tuple[Callable[..., Any], tuple[Any, ...]]


class _UnderWay(threading.local):
    """The payloads that this thread's pickling fills and reads, each with a memo; a nested one puts its own there."""

    sending: Payload | None = None
    receiving: Payload | None = None
    sending_memo: dict[int, Any] | None = None
    takes_attachments: bool = True
    receiving_memo: dict[int, Any] | None = None


_under_way = _UnderWay()


def _tensor_at(index: int) -> torch.Tensor:
    if _under_way.receiving is None:
        raise pickle.UnpicklingError("a stream with a tensor table can only be read by zrpc")
    return _under_way.receiving.tensors[index]


def _check_attachments() -> None:
    if not _under_way.takes_attachments:
        raise SerializationError("this value must do without tensors and RRefs")


def _reduce_tensor(tensor: torch.Tensor) -> Reduced:
    assert _under_way.sending is not None  # only dumps() uses this dispatch table
    _check_attachments()
    tensors = _under_way.sending.tensors
    tensors.append(tensor)
    return _tensor_at, (len(tensors) - 1,)


_base_reducers: dict[type, Callable[[Any], Reduced]] = {}


class _DispatchTable(dict[type, Callable[[Any], Any]]):
    """Reducers by class. Behind them: those of base classes, and those given to `copyreg`, at any time."""

    def __missing__(self, cls: type) -> Callable[[Any], Any]:
        for base, reducer in _base_reducers.items():
            if issubclass(cls, base):
                return reducer
        return copyreg.dispatch_table[cls]


_dispatch_table = _DispatchTable({torch.Tensor: _reduce_tensor})


def register_reducer(cls: type, reducer: Callable[[Any], Reduced]) -> None:
    """From now on pickle objects whose class is exactly `cls` as `reducer` says: `(function, arguments)` makes one."""
    _dispatch_table[cls] = reducer


def register_base_reducer(base: type, reducer: Callable[[Any], Reduced]) -> None:
    """From now on pickle objects of `base` and of all classes derived from it as `reducer` says.

    A reducer that is registered for exactly their class goes first; `copyreg`'s does not.
    """
    _base_reducers[base] = reducer


def board(key: bytes, passenger: Passenger) -> None:
    """Let `passenger` travel in the payload that this thread makes. For reducers, which put `key` into the stream."""
    payload = _under_way.sending
    assert payload is not None  # only dumps() calls reducers
    _check_attachments()
    if payload.passengers is None:
        payload.passengers = {}
    payload.passengers[key] = passenger


def alight(key: bytes) -> object | None:
    """Take what came for `key` out of the payload that this thread reads; None if nothing came ahead."""
    payload = _under_way.receiving
    return payload.passengers.pop(key, None) if payload is not None and payload.passengers else None


def dump_part(obj: Any) -> bytes:
    """Pickle `obj` into a stream of its own, whose tensors are in the payload that this thread makes. For reducers.

    If it raises, the payload is as it was before: what cannot be pickled can be left out.

    Raises:
        BaseException: whatever pickling `obj` raises.
    """
    payload, memo = _under_way.sending, sending_memo()
    assert payload is not None  # only dumps() calls reducers
    num_tensors, passengers, known = len(payload.tensors), dict(payload.passengers or {}), set(memo)
    stream = io.BytesIO()
    try:
        pickler = pickle.Pickler(stream, _PROTOCOL)
        pickler.dispatch_table = _dispatch_table
        pickler.dump(obj)
    except BaseException:
        del payload.tensors[num_tensors:]
        payload.passengers = passengers or None
        for key in memo.keys() - known:
            del memo[key]
        raise
    return stream.getvalue()


def load_part(stream: bytes) -> Any:
    """Make again what `dump_part` pickled. For what reducers name.

    Raises:
        BaseException: whatever unpickling raises.
    """
    return pickle.loads(stream)


def sending_memo() -> dict[int, Any]:
    """What reducers remember within the stream that this thread makes."""
    memo = _under_way.sending_memo
    if memo is None:
        memo = _under_way.sending_memo = {}
    return memo


def receiving_memo() -> dict[int, Any]:
    """What was made by reducers' functions within the stream that this thread reads."""
    memo = _under_way.receiving_memo
    if memo is None:
        memo = _under_way.receiving_memo = {}
    return memo


def dumps(obj: Any, *, whole: bool = False, attachments: bool = True) -> Payload:
    """Take `obj` apart. Tensors and buffers are not copied.

    Args:
        obj: what to take apart.
        whole: make a pickle stream in any case, and leave nothing but tensors out of it.
        attachments: whether tensors and passengers may be in it. Exceptions can do without.

    Raises:
        SerializationError: something in it cannot be pickled; the cause is attached and named.
    """
    if not whole:
        if obj is None:
            return Payload(_NONE)
        if type(obj) is torch.Tensor:
            return Payload(_ONE_TENSOR, [obj])
        if type(obj) in _PLAIN:
            with suppress(values.UnpackableError):
                return values.pack(obj)
    payload = Payload()
    outer, _under_way.sending = _under_way.sending, payload
    outer_memo, _under_way.sending_memo = _under_way.sending_memo, None
    took_attachments, _under_way.takes_attachments = _under_way.takes_attachments, attachments
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    try:
        pickler = pickle.Pickler(stream, _PROTOCOL, buffer_callback=None if whole else buffers.append)
        pickler.dispatch_table = _dispatch_table
        pickler.dump(obj)
        payload.buffers = [buffer.raw() for buffer in buffers]
    except BaseException as error:
        payload.passengers = None  # they stay; the error would keep them
        if is_interrupt(error):
            raise
        raise SerializationError(
            f"{repr_of(obj)} cannot be pickled: {text_of(error)}. Pass objects that pickle can name or copy: functions "
            "and classes defined at the top level of a module that both sides can import"
        ) from error
    finally:
        _under_way.sending = outer
        _under_way.sending_memo = outer_memo
        _under_way.takes_attachments = took_attachments
    if payload.passengers and outer is not None:  # within a reducer, which puts this stream into its own
        outer.passengers = payload.passengers = {**(outer.passengers or {}), **payload.passengers}
    payload.data = stream.getvalue()
    return payload


def dumps_call(call: tuple[Any, tuple[Any, ...], Mapping[str, Any]]) -> Payload:
    """Take `(function, args, kwargs)` apart, as `dumps`."""
    function, args, kwargs = call
    if (
        type(function) is FunctionType
        and _PLAIN_OR_TENSOR.issuperset(map(type, args))
        and _PLAIN_OR_TENSOR.issuperset(map(type, kwargs.values()))
        and _has_a_name(function)
    ):
        with suppress(values.UnpackableError):
            return values.pack([function.__module__, function.__name__, list(args), kwargs], _CALL)
    return dumps(call)


def _has_a_name(function: FunctionType) -> bool:
    """Whether its module has it under its name, at the top level: pickle would name it too."""
    name = function.__name__
    return function.__qualname__ == name and getattr(sys.modules.get(function.__module__), name, None) is function


def _load_call(payload: Payload) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    module, name, args, kwargs = values.unpack(payload, _CALL)
    return getattr(sys.modules.get(module) or importlib.import_module(module), name), tuple(args), kwargs


def loads(payload: Payload) -> Any:
    """Put a payload together again, whether `dumps`, `dumps_call` or `values.pack` made it. Its tensors are used as
    they are.

    Raises:
        SerializationError: the stream names a function or class that this process lacks, or is damaged.
        ProtocolError: packed values, or the one tensor, are damaged.
    """
    data = payload.data
    if len(data) == 0:
        return None
    if data == _ONE_TENSOR and len(payload.tensors) == 1:
        return payload.tensors[0]
    is_call = data[: len(_CALL)] == _CALL
    if data[0] == values.MAGIC and not is_call:
        return values.unpack(payload)
    outer, _under_way.receiving = _under_way.receiving, payload
    outer_memo, _under_way.receiving_memo = _under_way.receiving_memo, None
    if outer is not None and payload.passengers is None:  # this stream came in that one
        payload.passengers = outer.passengers
    try:
        return _load_call(payload) if is_call else pickle.loads(data, buffers=_own(payload))
    except (AttributeError, ImportError) as error:
        raise SerializationError(
            f"{text_of(error)}. The default RPC pickler does not serialize function code: define the function or class "
            "in a module that caller and callee both import"
        ) from error
    except (SerializationError, ProtocolError):
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise SerializationError(f"a received value cannot be unpickled: {describe(error)}") from error
    finally:
        _under_way.receiving = outer
        _under_way.receiving_memo = outer_memo


def _own(payload: Payload) -> Iterator[Buffer]:
    """The PEP 574 buffers as writable memory that only the rebuilt object will see, made as they are asked for."""
    for buffer in payload.buffers:
        yield bytearray(buffer) if memoryview(buffer).readonly else buffer
