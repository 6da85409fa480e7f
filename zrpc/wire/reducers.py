"""What reducers work with: which one is for a class, and what they put beside the pickle stream, or take from there.

A reducer says how objects of a class are pickled, as `object.__reduce_ex__` does. Modules that import this one give
theirs with `register_reducer` and `register_base`; `zrpc.wire.pickling` uses them all.
"""

from __future__ import annotations

import copyreg
import logging
import pickle
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import SerializationError
from zrpc.exception_text import is_interrupt, text_of
from zrpc.wire.payload import Passenger, Payload
from zrpc.wire.streams import Writer

if TYPE_CHECKING:
    from zrpc.wire.envelope import Buffer

log = logging.getLogger("zrpc")

PROTOCOL = 5
_SURELY_PICKLED = (type(None), bool, int, float, str, bytes, torch.Tensor)

Reduced = tuple[Any, ...]
"""What a reducer returns: a function that makes the object again, its arguments, and more (see `object.__reduce__`)."""


class UnderWay(threading.local):
    """The payloads that this thread's pickling fills and reads; a nested one puts its own there."""

    sending: Payload | None = None
    receiving: Payload | None = None
    buffers: list[Buffer] | None = None
    is_graph_kept: bool = False
    is_trial: bool = False
    takes_attachments: bool = True
    sending_memo: dict[int, Any] | None = None
    receiving_memo: dict[int, Any] | None = None

    def enter(
        self, payload: Payload, buffers: list[Buffer] | None, is_graph_kept: bool, takes_attachments: bool
    ) -> tuple[Any, ...]:
        """Fill `payload` from now on; what is to be given to `leave`."""
        outer = self.sending, self.buffers, self.is_graph_kept, self.takes_attachments, self.sending_memo
        self.sending, self.buffers, self.is_graph_kept = payload, buffers, is_graph_kept
        self.takes_attachments, self.sending_memo = takes_attachments, None
        return outer

    def leave(self, outer: tuple[Any, ...]) -> None:
        """Undo `enter`."""
        self.sending, self.buffers, self.is_graph_kept, self.takes_attachments, self.sending_memo = outer


under_way = UnderWay()


def _tensor_at(index: int) -> torch.Tensor:
    if under_way.receiving is None:
        raise pickle.UnpicklingError("a stream with a tensor table can only be read by zrpc")
    return under_way.receiving.tensors[index]


def _check_attachments() -> None:
    if not under_way.takes_attachments:
        raise SerializationError("this value must do without tensors and RRefs")


def reduce_tensor(tensor: torch.Tensor) -> Reduced:
    """Put a plain tensor into the table. For reducers of what is made of one."""
    assert under_way.sending is not None  # only dumps() calls reducers
    _check_attachments()
    tensors = under_way.sending.tensors
    tensors.append(tensor)
    made = _tensor_at, (len(tensors) - 1,)
    if type(tensor) is not torch.Tensor or not tensor.__dict__ or under_way.is_graph_kept or under_way.is_trial:
        return made
    attributes = {name: value for name, value in tensor.__dict__.items() if _is_picklable(value)}
    return *made, attributes, None, None, _set_attributes


def _is_picklable(attribute: object) -> bool:
    """Whether an attribute of a plain tensor can travel. On torch none does, so one that cannot may stay."""
    if type(attribute) in _SURELY_PICKLED:
        return True
    now, was_trial = under_way, under_way.is_trial
    outer = now.enter(Payload(), None, now.is_graph_kept, now.takes_attachments)
    now.is_trial = True
    try:
        pickler = pickle.Pickler(Writer(), PROTOCOL)
        pickler.dispatch_table = dispatch_table
        pickler.dump(attribute)
    except BaseException as error:
        if is_interrupt(error):
            raise
        log.debug("an attribute of a tensor stays here: %s", text_of(error))
        return False
    finally:
        now.leave(outer)
        now.is_trial = was_trial
    return True


def _set_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    tensor.__dict__.update(attributes)


class _DispatchTable(dict[type, Callable[[Any], Any]]):
    """Our reducers, and behind them those that anybody gives to `copyreg`, at any time."""

    def __missing__(self, cls: type) -> Callable[[Any], Any]:
        if issubclass(cls, BaseException) and _of_exceptions:
            return _of_exceptions[0]
        reducer = copyreg.dispatch_table.get(cls)
        if reducer is not None:
            return reducer
        for base, reducer_of in _bases:
            if issubclass(cls, base):
                return reducer_of(cls)
        raise KeyError(cls)


dispatch_table = _DispatchTable({torch.Tensor: reduce_tensor})
_of_exceptions: list[Callable[[Any], Reduced]] = []
_bases: list[tuple[type, Callable[[type], Callable[[Any], Any]]]] = []


def register_reducer(cls: type, reducer: Callable[[Any], Reduced]) -> None:
    """From now on pickle objects whose class is exactly `cls` as `reducer` says: `(function, arguments)` makes one."""
    dispatch_table[cls] = reducer


def register_base(base: type, reducer_of: Callable[[type], Callable[[Any], Any]]) -> None:
    """From now on pickle objects of a class that derives from `base`, and has no reducer, as `reducer_of` it says."""
    _bases.append((base, reducer_of))


def register_exceptions(reducer: Callable[[Any], Reduced]) -> None:
    """From now on pickle exceptions of every class as `reducer` says, which heeds those given to `copyreg`."""
    _of_exceptions[:] = [reducer]


def dump_part(obj: Any) -> bytes:
    """Pickle `obj` into a stream of its own, whose tensors and buffers are in the payload that this thread makes.

    For reducers. If it raises, the payload is as it was before: what cannot be pickled can be left out.

    Raises:
        BaseException: whatever pickling `obj` raises.
    """
    payload, buffers, memo = under_way.sending, under_way.buffers, sending_memo()
    assert payload is not None  # only dumps() calls reducers
    num_tensors, num_buffers = len(payload.tensors), len(buffers or ())
    passengers, known = dict(payload.passengers or {}), set(memo)
    stream = Writer()
    try:
        pickler = pickle.Pickler(stream, PROTOCOL)
        pickler.dispatch_table = dispatch_table
        pickler.dump(obj)
        return stream.whole()
    except BaseException:
        del payload.tensors[num_tensors:]
        if buffers is not None:
            del buffers[num_buffers:]
        payload.passengers = passengers or None
        for key in memo.keys() - known:
            del memo[key]
        raise


def load_part(stream: bytes) -> Any:
    """Make again what `dump_part` pickled. For what reducers name.

    Raises:
        BaseException: whatever unpickling raises.
    """
    return pickle.loads(stream)


def sending_memo() -> dict[int, Any]:
    """What reducers remember within the stream that this thread makes."""
    memo = under_way.sending_memo
    if memo is None:
        memo = under_way.sending_memo = {}
    return memo


def receiving_memo() -> dict[int, Any]:
    """What was made by reducers' functions within the stream that this thread reads."""
    memo = under_way.receiving_memo
    if memo is None:
        memo = under_way.receiving_memo = {}
    return memo


def is_graph_kept() -> bool:
    """Whether this thread pickles what torch passes on as tensors, with their gradients. For reducers."""
    return under_way.is_graph_kept


def note_cut_off() -> None:
    """Something that requires grad travels without its graph. For reducers."""
    assert under_way.sending is not None  # only dumps() calls reducers
    under_way.sending.is_cut_off = True


def set_aside(buffer: memoryview) -> int | None:
    """Let `buffer` travel beside the stream; its index for `own_buffer`. None: this stream must hold everything."""
    buffers = under_way.buffers
    if buffers is None:
        return None
    buffers.append(buffer)
    return len(buffers) - 1


def own_buffer(index: int) -> Buffer:
    """The buffer that `set_aside` gave this index: writable memory that nothing else sees. It is asked for once."""
    if under_way.receiving is None:
        raise pickle.UnpicklingError("a stream with buffers beside it can only be read by zrpc")
    buffer = under_way.receiving.buffers[index]
    return bytearray(buffer) if memoryview(buffer).readonly else buffer


def board(key: bytes, passenger: Passenger) -> None:
    """Let `passenger` travel in the payload that this thread makes. For reducers, which put `key` into the stream."""
    payload = under_way.sending
    assert payload is not None  # only dumps() calls reducers
    _check_attachments()
    if payload.passengers is None:
        payload.passengers = {}
    payload.passengers[key] = passenger


def alight(key: bytes) -> object | None:
    """Take what came for `key` out of the payload that this thread reads; None if nothing came ahead."""
    payload = under_way.receiving
    return payload.passengers.pop(key, None) if payload is not None and payload.passengers else None
