"""Pickle with tensors and large buffers set aside.

Plain `torch.Tensor` objects leave the stream for the payload's tensor table, and large `bytes` and the like for its
buffers (`zrpc.wire.streams`). `zrpc.wire.reducers` says how other classes travel in a way of their own: numpy arrays
(`zrpc.wire.arrays`), storages (`zrpc.wire.storages`) and tensor subclasses (`zrpc.wire.subclasses`) among them.

What is usual is not pickled at all, which takes two to three times as long: a result that is nothing, one tensor or a
plain value, and a call of a module's function with nothing but tensors and plain values.
"""

from __future__ import annotations

import importlib
import pickle
import struct
import sys
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zrpc.errors import NotAllowedError, ProtocolError, SerializationError
from zrpc.exception_text import describe, is_interrupt, repr_of, text_of
from zrpc.wire import (  # noqa: F401  # three of them: for their reducers
    arrays,
    by_value,
    loading,
    storages,
    streams,
    subclasses,
    values,
)
from zrpc.wire.envelope import Buffer
from zrpc.wire.exception_state import Named, take_all_apart
from zrpc.wire.payload import Payload
from zrpc.wire.reducers import PROTOCOL, ReceivedExceptions, dispatch_table, exception_of, under_way
from zrpc.wire.reducers import alight as alight
from zrpc.wire.reducers import board as board
from zrpc.wire.reducers import register_reducer as register_reducer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

_NONE = b""
ONE_TENSOR = bytes([values.MAGIC, 0])
CALL = bytes([values.MAGIC, 2])
"""What a call by name begins with: module, name, arguments and keyword arguments follow."""
_IN_PIECES = bytes([values.MAGIC, 3])
_WITH_EXCEPTIONS = bytes([values.MAGIC, 4])
_EXCEPTIONS_BESIDE = bytes([values.MAGIC, 5])
_LENGTH = struct.Struct("<Q")
_NUMBERS = frozenset({type(None), bool, int, float})
_TEXTS = frozenset({str, bytes})
_PLAIN = _NUMBERS | _TEXTS
"""What is equal to its copy, has no parts, and may be packed, within msgpack's bounds."""
_NUMBERS_OR_TENSOR = _NUMBERS | {torch.Tensor}
_PLAIN_OR_TENSOR = _PLAIN | {torch.Tensor}


def _reduce_memory_format(memory_format: torch.memory_format) -> tuple[Any, ...]:
    """By its name. torch's own way names whichever module pickle finds first that has imported torch."""
    return values.torch_constant, (str(memory_format).removeprefix("torch."),)


register_reducer(torch.memory_format, _reduce_memory_format)


def dumps(obj: Any, *, whole: bool = False, keep_graph: bool = False, attachments: bool = True) -> Payload:
    """Take `obj` apart. Tensors and buffers are not copied.

    Args:
        obj: what to take apart.
        whole: make a pickle stream in any case, and leave nothing but tensors out of it.
        keep_graph: tensors of subclasses travel as plain tensors, with their gradients, as torch passes on what its
            operators take.
        attachments: whether tensors and passengers may be in it. Exceptions can do without.

    Raises:
        SerializationError: something in it cannot be pickled; the cause is attached and named.
    """
    if not whole:
        cls = type(obj)
        if obj is None:
            return Payload(_NONE)
        if cls is torch.Tensor and not obj.__dict__:
            return Payload(ONE_TENSOR, [obj])
        if _is_plain(cls) and not (cls in _TEXTS and len(obj) >= streams.PIECE_MIN_NBYTES):
            with suppress(values.UnpackableError):
                return values.pack(obj)
    try:
        return _dumps(obj, whole, keep_graph, attachments, pickle.Pickler)
    except SerializationError as error:
        if not by_value.may_help(error.__cause__):
            raise
    return dumps_by_value(obj, whole=whole, keep_graph=keep_graph, attachments=attachments)


def dumps_by_value(obj: Any, *, whole: bool = False, keep_graph: bool = False, attachments: bool = True) -> Payload:
    """As `dumps`, but functions and classes without a name that others know travel as code.

    Raises:
        SerializationError: as `dumps`; or there is no cloudpickle here.
    """
    pickler_class = by_value.pickler_class()
    if pickler_class is None:
        raise SerializationError(f"{repr_of(obj)} cannot be sent by value: install cloudpickle (`zrpc[by-value]`)")
    return _dumps(obj, whole, keep_graph, attachments, pickler_class)


def _dumps(obj: Any, whole: bool, keep_graph: bool, attachments: bool, pickler_class: type[pickle.Pickler]) -> Payload:
    payload, buffers = Payload(), list[Buffer]()
    now = under_way
    outer = now.enter(payload, None if whole else buffers, keep_graph, attachments)
    stream = streams.Writer()
    try:
        pickler = pickler_class(stream, PROTOCOL)
        if pickler_class is pickle.Pickler:
            pickler.dispatch_table = dispatch_table
        pickler.dump(obj)
        exceptions = take_all_apart()
    except BaseException as error:
        payload.passengers = None  # they stay; the error would keep them
        if is_interrupt(error) or isinstance(error, SerializationError):
            raise
        raise SerializationError(
            f"{repr_of(obj)} cannot be pickled: {text_of(error)}. Pass objects that pickle can name or copy: functions "
            "and classes defined at the top level of a module that both sides can import. With cloudpickle "
            "(`pip install zrpc[by-value]`, on both sides) lambdas, closures and notebook cells travel too"
        ) from error
    finally:
        now.leave(outer)
    around = now.sending
    if around is not None:  # within a reducer, which puts this stream into its own
        around.is_cut_off |= payload.is_cut_off
        if payload.passengers:
            around.passengers = payload.passengers = {**(around.passengers or {}), **payload.passengers}
    if whole or not stream.is_large():
        payload.data = stream.whole()
    else:
        pieces = stream.joined()
        payload.data = _IN_PIECES + streams.place(len(buffers), len(pieces))
        buffers += pieces
    if exceptions is not None:
        if whole or len(exceptions) < streams.PIECE_MIN_NBYTES:
            payload.data = _WITH_EXCEPTIONS + _LENGTH.pack(len(exceptions)) + exceptions + payload.data
        else:
            payload.data = _EXCEPTIONS_BESIDE + _LENGTH.pack(len(buffers)) + payload.data
            buffers.append(exceptions)
    payload.buffers = buffers
    return payload


def _is_plain(cls: type) -> bool:
    try:
        return cls in _PLAIN
    except BaseException as error:  # its metaclass has no hash
        if is_interrupt(error):
            raise
        return False


def dumps_call(call: tuple[Any, tuple[Any, ...], Mapping[str, Any]], *, keep_graph: bool = False) -> Payload:
    """Take `(function, args, kwargs)` apart, as `dumps`."""
    function, args, kwargs = call
    if type(function) is FunctionType and _are_plain(args) and _are_plain(kwargs.values()) and _has_a_name(function):
        try:
            return values.pack([function.__module__, function.__name__, list(args), kwargs], CALL, bare=True)
        except values.UnpackableError:
            pass
    return dumps(call, keep_graph=keep_graph)


def _are_plain(arguments: Collection[Any]) -> bool:
    """Whether they are tensors and plain values, none of them large."""
    if not arguments:
        return True
    try:
        if _NUMBERS_OR_TENSOR.issuperset(map(type, arguments)):
            return True
        return (
            _PLAIN_OR_TENSOR.issuperset(map(type, arguments))
            and sum([len(one) for one in arguments if type(one) in _TEXTS]) < streams.PIECE_MIN_NBYTES
        )
    except TypeError:  # a class whose metaclass has no hash
        return False


def _has_a_name(function: FunctionType) -> bool:
    """Whether its module has it under its name, at the top level: pickle would name it too."""
    name = function.__name__
    return function.__qualname__ == name and getattr(sys.modules.get(function.__module__), name, None) is function


def dumps_exception(error: BaseException, *, attachments: bool = True) -> Payload:
    """Take an exception apart, the outcome of a call, as `dumps`."""
    return dumps(Named(error), attachments=attachments)


def load_named_call(payload: Payload) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call that `dumps_call` named, and did not pickle. For `loads`."""
    module, name, args, kwargs = values.unpack(payload, CALL)
    return getattr(sys.modules.get(module) or importlib.import_module(module), name), tuple(args), kwargs


def load_checked_call(payload: Payload) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same where not every module may be named."""
    module, name, args, kwargs = values.unpack(payload, CALL)
    return loading.find(module, name), tuple(args), kwargs


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
    if data == ONE_TENSOR and len(payload.tensors) == 1:
        return payload.tensors[0]
    received = None
    if data[: len(_WITH_EXCEPTIONS)] in (_WITH_EXCEPTIONS, _EXCEPTIONS_BESIDE):
        received, data = _take_exceptions(data, payload.buffers)
        if len(data) == 0:
            raise ProtocolError("a table of exceptions came, and nothing with it")
    is_call = data[: len(CALL)] == CALL
    if data[0] == values.MAGIC and not is_call and data[: len(_IN_PIECES)] != _IN_PIECES:
        return values.unpack(payload)
    outer, under_way.receiving = under_way.receiving, payload
    outer_exceptions, under_way.received_exceptions = under_way.received_exceptions, received
    if outer is not None and payload.passengers is None:  # this stream came in that one
        payload.passengers = outer.passengers
    try:
        value = load_named_call(payload) if is_call else _unpickle(data, payload)
        while received is not None and received.links:
            set_link, number = received.links.pop()
            set_link(exception_of(number))
        return value
    except (AttributeError, ImportError) as error:
        raise SerializationError(
            f"{text_of(error)}. The default RPC pickler does not serialize function code: define the function or class "
            "in a module that caller and callee both import, or install cloudpickle (`pip install zrpc[by-value]`) for "
            "both, which sends lambdas, closures and what a script or notebook defines by value"
        ) from error
    except (SerializationError, ProtocolError, NotAllowedError):
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise SerializationError(f"a received value cannot be unpickled: {describe(error)}") from error
    finally:
        under_way.receiving = outer
        under_way.received_exceptions = outer_exceptions


def _take_exceptions(data: Buffer, buffers: Sequence[Buffer]) -> tuple[ReceivedExceptions, Buffer]:
    """The table of exceptions that `data` begins with or names the buffer of, and what follows."""
    begin = len(_WITH_EXCEPTIONS) + _LENGTH.size
    try:
        (number,) = _LENGTH.unpack(data[len(_WITH_EXCEPTIONS) : begin])
        if data[: len(_EXCEPTIONS_BESIDE)] == _EXCEPTIONS_BESIDE:
            return ReceivedExceptions(loading.loads(buffers[number])), data[begin:]
        return ReceivedExceptions(loading.loads(data[begin : begin + number])), data[begin + number :]
    except NotAllowedError:
        raise
    except Exception as error:
        raise ProtocolError(f"a table of exceptions cannot be read: {describe(error)}") from error


def _unpickle(data: Buffer, payload: Payload) -> Any:
    if data[: len(_IN_PIECES)] != _IN_PIECES:
        return loading.loads(data)
    pieces = streams.placed(data[len(_IN_PIECES) :], payload.buffers)
    reader: Any = streams.Reader(pieces)  # pickle takes any buffers
    return loading.load_from(reader)


class Codec(NamedTuple):
    """How this process takes values apart and puts them together: what the functions of these names do here."""

    dumps: Callable[..., Payload]
    dumps_call: Callable[..., Payload]
    dumps_exception: Callable[..., Payload]
    loads: Callable[[Payload], Any]
    loads_call: Callable[[Payload], Any]
    load_named_call: Callable[[Payload], Any]


loads_call = loads
"""As `loads`, for a payload that is to be run."""

PICKLE = Codec(dumps, dumps_call, dumps_exception, loads, loads_call, load_named_call)
"""Calls, values and exceptions of any kind: what this module does of itself."""
CHECKED = PICKLE._replace(load_named_call=load_checked_call)
"""The same, and calls by name are resolved by `loading.find`, as all other names are anyway."""


def use(codec: Codec) -> None:
    """From now on the functions of this module are those of `codec`. For `init_rpc`, which so decides once."""
    globals().update(codec._asdict())
