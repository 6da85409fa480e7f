"""The messages: one frozen dataclass each, with the code it travels under.

A message here is only the small typed part of what travels; values (arguments, results, gradients) ride beside it in
the envelope (`zrpc.wire.envelope`). docs/wire.md lists who sends each, what answers it and whether it may be repeated.
Codes are part of the protocol: a code is never used again for another message.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from zrpc import remote_text
from zrpc.errors import ProtocolError
from zrpc.ids import ForkId, GlobalId, RRefId

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOCOL_VERSION = 1

Line = str  # text for people, as it arrives: see `remote_text.line`
Lines = str  # the same: see `remote_text.lines`


class Message:
    """Base of every message. `CODE` is its number on the wire; its fields travel in the order of their definition."""

    __slots__ = ()
    CODE: ClassVar[int]
    IDEMPOTENT: ClassVar[bool] = False
    """A repeated delivery changes nothing: such a request may be sent again when its answer is missing."""


MESSAGES: dict[int, type[Message]] = {}
FIELD_GETTERS: dict[type[Message], Callable[[Any], list[Any]]] = {}
FIELD_TYPES: dict[type[Message], list[type]] = {}
"""As what each field arrives."""

_LISTS = ("list[Any]", "list[int]", "list[str]", "list[GlobalId]", "GlobalId", "RRefId", "ForkId")
_ARRIVES_AS: dict[str, type] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, bytes)},
    **dict.fromkeys(("Line", "Lines"), str),
    **dict.fromkeys(_LISTS, list),
    "dict[str, Any]": dict,
}


def global_id(value: Any) -> GlobalId:
    """The id that travelled as `value`.

    Raises:
        ProtocolError: it is none.
    """
    if type(value) is list and len(value) == 3:
        created_on, local_id, life = value
        if type(created_on) is type(local_id) is int and type(life) is bytes:
            return GlobalId(created_on, local_id, life)
    raise ProtocolError(f"{reprlib.repr(value)} is not a global id")


def _all_of(kind: type, values: list[Any]) -> list[Any]:
    if not all([type(value) is kind for value in values]):
        raise ProtocolError(f"{reprlib.repr(values)} is no list of {kind.__name__}")
    return values


_RESTORED_BY: dict[str, Callable[[Any], Any]] = {
    "GlobalId": global_id,
    "RRefId": global_id,
    "ForkId": global_id,
    "list[GlobalId]": lambda values: [global_id(value) for value in values],
    "list[int]": partial(_all_of, int),
    "list[str]": partial(_all_of, str),
    "Line": remote_text.line,
    "Lines": remote_text.lines,
}
"""msgpack hands tuples back as lists: what makes ids of them again, and what checks and cleans others."""

_RESTORERS: dict[type[Message], list[tuple[int, Callable[[Any], Any]]]] = {}  # which fields those are, by their places

M = TypeVar("M", bound=type[Message])


def _getter(names: list[str]) -> Callable[[Any], list[Any]]:
    if not names:
        return lambda message: []
    get = attrgetter(*names)
    return (lambda message: [get(message)]) if len(names) == 1 else (lambda message: list(get(message)))


def message_type(code: int, idempotent: bool = False) -> Callable[[M], M]:
    """Let a dataclass travel under `code`. Idempotent: see `Message`."""

    def register(cls: M) -> M:
        if code in MESSAGES:
            raise ValueError(f"message code {code} is taken by {MESSAGES[code].__name__}")
        cls.CODE = code
        cls.IDEMPOTENT = idempotent
        MESSAGES[code] = cls
        own = fields(cls)  # type: ignore[arg-type]  # a dataclass by now
        FIELD_GETTERS[cls] = _getter([f.name for f in own])
        FIELD_TYPES[cls] = [_ARRIVES_AS[str(f.type)] for f in own]  # a KeyError: say there as what the new type arrives
        places = enumerate(str(f.type) for f in own)
        _RESTORERS[cls] = [(place, _RESTORED_BY[kind]) for place, kind in places if kind in _RESTORED_BY]
        return cls

    return register


def make_message(code: object, values: object) -> Message:
    """The message that travelled as `code` and `values`.

    Raises:
        ProtocolError: there is no such message, or these are not its fields.
    """
    cls = MESSAGES.get(code) if type(code) is int else None
    if cls is None:
        raise ProtocolError(f"message code {reprlib.repr(code)} is not known here: install the same zrpc on both sides")
    if type(values) is list:
        kinds = list(map(type, values))
        if kinds == FIELD_TYPES[cls] or _fit(kinds, FIELD_TYPES[cls]):
            for place, restore in _RESTORERS[cls]:
                values[place] = restore(values[place])
            return cls(*values)
    raise ProtocolError(f"the fields {reprlib.repr(values)} do not make a {cls.__name__}")


def _fit(kinds: list[type], wanted: list[type]) -> bool:
    """The same, but for whole numbers in the place of floats."""
    return len(kinds) == len(wanted) and all(
        kind is want or (want is float and kind is int) for kind, want in zip(kinds, wanted, strict=True)
    )


# ---- calls -----------------------------------------------------------------------------------------------------


@message_type(1)
@dataclass(frozen=True, slots=True)
class PythonCall(Message):
    """Run a pickled `(function, args, kwargs)` and send back its result."""

    async_execution: bool = False


@message_type(2)
@dataclass(frozen=True, slots=True)
class BuiltinCall(Message):
    """Run the torch operator `op` (such as `aten::add`) on the packed `(args, kwargs)` and send back its result."""

    op: str


@message_type(3)
@dataclass(frozen=True, slots=True)
class PythonRemote(Message):
    """Run a pickled `(function, args, kwargs)` and keep its result as the value of the RRef `rref_id`."""

    rref_id: RRefId
    fork_id: ForkId
    async_execution: bool = False


@message_type(4)
@dataclass(frozen=True, slots=True)
class BuiltinRemote(Message):
    """Run the torch operator `op` and keep its result as the value of the RRef `rref_id`."""

    rref_id: RRefId
    fork_id: ForkId
    op: str


# ---- answers ---------------------------------------------------------------------------------------------------


@message_type(10)
@dataclass(frozen=True, slots=True)
class Reply(Message):
    """The request was carried out; a result, if any, rides beside it."""


@message_type(11)
@dataclass(frozen=True, slots=True)
class Failure(Message):
    """The request raised. `type_name` and `text` are for people; the pickled exception, if it could be, rides along."""

    type_name: Line
    text: Lines
    traceback: Lines


@message_type(12, idempotent=True)
@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """The sender waits no longer for the answer to its request `call_id`: do not begin it, or stop. Not answered."""

    call_id: int


# ---- remote references -----------------------------------------------------------------------------------------


@message_type(20)
@dataclass(frozen=True, slots=True)
class RRefFetch(Message):
    """Send a copy of the value of `rref_id` to its user `fork_id`, once it has one. User to owner."""

    rref_id: RRefId
    fork_id: ForkId


@message_type(21, idempotent=True)
@dataclass(frozen=True, slots=True)
class RRefForkRequest(Message):
    """`fork_id` is a new user of `rref_id`: keep the value alive for it. New user to owner."""

    rref_id: RRefId
    fork_id: ForkId


@message_type(22, idempotent=True)
@dataclass(frozen=True, slots=True)
class RRefChildAccept(Message):
    """The owner knows of the child `fork_id` now: its parent need not be kept for it. Child to parent."""

    fork_id: ForkId


@message_type(23, idempotent=True)
@dataclass(frozen=True, slots=True)
class RRefUserDelete(Message):
    """The user `fork_id` of `rref_id` is gone. User to owner."""

    rref_id: RRefId
    fork_id: ForkId


@message_type(24, idempotent=True)
@dataclass(frozen=True, slots=True)
class RRefCreationFailed(Message):
    """The call that was to create `rref_id` failed at its creator, and may never come. Creator to owner."""

    rref_id: RRefId


# ---- distributed autograd --------------------------------------------------------------------------------------


@message_type(30)
@dataclass(frozen=True, slots=True)
class BackwardRequest(Message):
    """Gradients for the send function `autograd_message_id` of `context_id`: run backward from it, within `pass_id`."""

    context_id: int
    autograd_message_id: GlobalId
    pass_id: GlobalId
    retain_graph: bool


@message_type(31)
@dataclass(frozen=True, slots=True)
class RRefBackward(Message):
    """Run `backward` from the value of `rref_id` under `context_id`, for its user `fork_id`. User to owner."""

    rref_id: RRefId
    fork_id: ForkId
    context_id: int
    retain_graph: bool


@message_type(32, idempotent=True)
@dataclass(frozen=True, slots=True)
class ReleaseContexts(Message):
    """These autograd contexts are over: free what belongs to them, and tell whom you told of them."""

    context_ids: list[int]


@message_type(33, idempotent=True)
@dataclass(frozen=True, slots=True)
class AbortBackward(Message):
    """The backward pass `pass_id` of `context_id` failed somewhere: stop it, and tell whom you told of the context."""

    context_id: int
    pass_id: GlobalId
    reason: Line


@message_type(34)
@dataclass(frozen=True, slots=True)
class MarkSends(Message):
    """The send functions `autograd_message_ids` will get gradients in `pass_id`.

    Answered once all that they lead to are marked.
    """

    context_id: int
    pass_id: GlobalId
    retain_graph: bool
    autograd_message_ids: list[GlobalId]


@message_type(35, idempotent=True)
@dataclass(frozen=True, slots=True)
class JoinContexts(Message):
    """The sender knows these contexts of the receiver's: tell it when they are over, at once if they are."""

    context_ids: list[int]


# ---- worker and broker -----------------------------------------------------------------------------------------


@message_type(40)
@dataclass(frozen=True, slots=True)
class Register(Message):
    """A worker asks the broker to be let in. `rank` -1: give me one. `world_size` 0: the group may grow and shrink.

    `card` is its own record, handed to the others as it is. `group` keeps apart what one broker serves at a time.
    """

    name: str
    rank: int
    world_size: int
    card: dict[str, Any]
    group: str = "default"


@message_type(41)
@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The group is complete (or, if dynamic, you are in it): the broker's answer to `Register` and `Rejoin`.

    `members` holds a `[incarnation, name, rank, card]` for every worker there. One that comes back says the `run`.
    """

    rank: int
    members: list[Any]
    heartbeat_interval_s: float
    run: bytes = b""


@message_type(42)
@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The broker does not let the worker in; `reason` says why and what to do."""

    reason: Line


@message_type(43)
@dataclass(frozen=True, slots=True)
class Joined(Message):
    """A worker came into a dynamic group. Broker to everybody in it."""

    incarnation: bytes
    name: str
    rank: int
    card: dict[str, Any]


@message_type(44)
@dataclass(frozen=True, slots=True)
class Left(Message):
    """A worker is gone: it left (`lost` false) or died or fell silent (`lost` true). Broker to all in the group."""

    incarnation: bytes
    lost: bool
    reason: Line


@message_type(45)
@dataclass(frozen=True, slots=True)
class Leave(Message):
    """The worker shuts down. Worker to broker, and in a dynamic group to everybody."""


@message_type(46, idempotent=True)
@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """I am alive, and you? Worker to broker at every interval, which answers with the same; worker to worker."""


@message_type(47, idempotent=True)
@dataclass(frozen=True, slots=True)
class Forming(Message):
    """Not all are there yet: the broker's answer to a `Register` or `Heartbeat` that comes before `Welcome`.

    `names` holds who is there, `world_size` how many there must be.
    """

    names: list[str]
    world_size: int
    heartbeat_interval_s: float
