"""What reducers work with: which one is for a class, and what they put beside the pickle stream, or take from there.

A reducer says how objects of a class are pickled, as `object.__reduce_ex__` does. Modules that import this one give
theirs with `register_reducer` and `register_base`; `zrpc.wire.pickling` uses them all.
"""

from __future__ import annotations

import copyreg
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from zrpc.errors import RemoteError, SerializationError
from zrpc.exception_text import is_interrupt, text_of
from zrpc.wire import loading
from zrpc.wire.payload import Passenger, Payload
from zrpc.wire.streams import Writer

if TYPE_CHECKING:
    from zrpc.wire.envelope import Buffer

log = logging.getLogger("zrpc")

PROTOCOL = 5
_SURELY_PICKLED = (type(None), bool, int, float, str, bytes, torch.Tensor)

Reduced = tuple[Any, ...]
"""What a reducer returns: a function that makes the object again, its arguments, and more (see `object.__reduce__`)."""


class SentExceptions:
    """The exceptions that a stream leads to. Each is in a table beside the stream, which has its number."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._numbers: dict[int, int] = {}

    def number_of(self, error: BaseException) -> int:
        """The number of `error`, which is taken in if it is new."""
        number = self._numbers.setdefault(id(error), len(self.errors))
        if number == len(self.errors):
            self.errors.append(error)
        return number

    def cut(self, length: int) -> None:
        """Forget all but the first `length`."""
        for error in self.errors[length:]:
            del self._numbers[id(error)]
        del self.errors[length:]


class ReceivedExceptions:
    """The table that came beside a stream, and what was made of it.

    Attributes:
        states: what tells of each exception.
        made: the exceptions, by number; None: it is being made.
        links: what is to be done once the stream is read: `set_link(exception of that number)`.
    """

    def __init__(self, states: list[tuple[Any, ...]]) -> None:
        self.states = states
        self.made: dict[int, BaseException | None] = {}
        self.links: list[tuple[Callable[[BaseException], object], int]] = []


class UnderWay(threading.local):
    """The payloads that this thread's pickling fills and reads; a nested one puts its own there."""

    sending: Payload | None = None
    receiving: Payload | None = None
    buffers: list[Buffer] | None = None
    is_graph_kept: bool = False
    is_trial: bool = False
    takes_attachments: bool = True
    sent_exceptions: SentExceptions | None = None
    received_exceptions: ReceivedExceptions | None = None

    def enter(
        self, payload: Payload, buffers: list[Buffer] | None, is_graph_kept: bool, takes_attachments: bool
    ) -> tuple[Any, ...]:
        """Fill `payload` from now on; what is to be given to `leave`."""
        outer = self.sending, self.buffers, self.is_graph_kept, self.takes_attachments, self.sent_exceptions
        self.sending, self.buffers, self.is_graph_kept = payload, buffers, is_graph_kept
        self.takes_attachments, self.sent_exceptions = takes_attachments, None
        return outer

    def leave(self, outer: tuple[Any, ...]) -> None:
        """Undo `enter`."""
        self.sending, self.buffers, self.is_graph_kept, self.takes_attachments, self.sent_exceptions = outer


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
    if not isinstance(tensor, torch.Tensor):
        raise pickle.UnpicklingError(f"attributes came for a {type(tensor).__name__} instead of a tensor")
    tensor.__dict__.update(attributes)


class _DispatchTable(dict[type, Callable[[Any], Any]]):
    """Our reducers, and behind them those that anybody gives to `copyreg`, at any time."""

    def __missing__(self, cls: type) -> Callable[[Any], Any]:
        if issubclass(cls, BaseException):  # it heeds what `copyreg` has
            return reduce_exception
        reducer = copyreg.dispatch_table.get(cls)
        if reducer is not None:
            return reducer
        for base, reducer_of in _bases:
            if issubclass(cls, base):
                return reducer_of(cls)
        raise KeyError(cls)


dispatch_table = _DispatchTable({torch.Tensor: reduce_tensor})
_bases: list[tuple[type, Callable[[type], Callable[[Any], Any]]]] = []


def reduce_exception(error: BaseException) -> Reduced:
    """Name an exception; `zrpc.wire.exception_state` says how it travels."""
    return exception_of, (sent_exceptions().number_of(error),)


def exception_of(number: int) -> BaseException:
    """The exception of that number. It is made when it is first asked for."""
    received = received_exceptions()
    if number not in received.made:
        received.made[number] = None
        received.made[number] = _make_exception(received.states[number])
    made = received.made[number]
    return RemoteError("an exception that leads back to itself by its arguments") if made is None else made


def make_exceptions_with(make: Callable[[tuple[Any, ...]], BaseException]) -> None:
    """From now on make exceptions of their states as `make` does."""
    global _make_exception
    _make_exception = make


_make_exception: Callable[[tuple[Any, ...]], BaseException]


def register_reducer(cls: type, reducer: Callable[[Any], Reduced]) -> None:
    """From now on pickle objects whose class is exactly `cls` as `reducer` says: `(function, arguments)` makes one."""
    dispatch_table[cls] = reducer


def register_base(base: type, reducer_of: Callable[[type], Callable[[Any], Any]]) -> None:
    """From now on pickle objects of a class that derives from `base`, and has no reducer, as `reducer_of` it says."""
    _bases.append((base, reducer_of))


def dump_part(obj: Any) -> bytes:
    """Pickle `obj` into a stream of its own, whose tensors and buffers are in the payload that this thread makes.

    For reducers. If it raises, the payload is as it was before: what cannot be pickled can be left out.

    Raises:
        BaseException: whatever pickling `obj` raises.
    """
    with tentatively():
        stream = Writer()
        pickler = pickle.Pickler(stream, PROTOCOL)
        pickler.dispatch_table = dispatch_table
        pickler.dump(obj)
        return stream.whole()


@contextmanager
def tentatively() -> Iterator[None]:
    """Where the body raises, the payload that this thread makes is as it was before."""
    payload, buffers, exceptions = under_way.sending, under_way.buffers, sent_exceptions()
    assert payload is not None  # only dumps() calls reducers
    num_tensors, num_buffers, num_exceptions = len(payload.tensors), len(buffers or ()), len(exceptions.errors)
    passengers = dict(payload.passengers or {})
    try:
        yield
    except BaseException:
        del payload.tensors[num_tensors:]
        if buffers is not None:
            del buffers[num_buffers:]
        payload.passengers = passengers or None
        exceptions.cut(num_exceptions)
        raise


def load_part(stream: bytes) -> Any:
    """Make again what `dump_part` pickled. For what reducers name.

    Raises:
        BaseException: whatever unpickling raises.
    """
    return loading.loads(stream)


def sent_exceptions() -> SentExceptions:
    """The exceptions that the stream that this thread makes leads to."""
    found = under_way.sent_exceptions
    if found is None:
        found = under_way.sent_exceptions = SentExceptions()
    return found


def received_exceptions() -> ReceivedExceptions:
    """The exceptions of the stream that this thread reads."""
    found = under_way.received_exceptions
    if found is None:
        raise pickle.UnpicklingError("a stream with exceptions beside it can only be read by zrpc")
    return found


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
