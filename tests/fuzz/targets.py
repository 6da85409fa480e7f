"""Every decoder of bytes of others, with valid messages to begin with.

A target takes frames, decodes them and uses what came of them as zrpc would. It may raise `ProtocolError`, and nothing
else; what it makes may not take more than twice what came and 1 MiB.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import tracemalloc
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import torch
import torch.distributed as dist

from tests.fuzz.transport_targets import (
    Slabs,
    chunk,
    descriptor_of,
    packet_seeds,
    slab_seeds,
    use_batch,
    use_chunks,
    use_packets,
)  # fmt: skip
from zrpc.autograd import gradients, hook
from zrpc.errors import ProtocolError, RefusedError, RendezvousError, SerializationError
from zrpc.ids import GlobalId, WorkerInfo
from zrpc.membership.authenticated_store import AuthenticatedStore
from zrpc.membership.device_maps import Placement
from zrpc.membership.group import Member
from zrpc.membership.members import interval_s, member_of, members_of
from zrpc.membership.records import Failure as StartFailure
from zrpc.membership.records import Record, pack_roster, unpack_roster
from zrpc.rref.forkdata import ForkData
from zrpc.secret import Secret
from zrpc.wire import exceptions, packed_bytes, pickling, values
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import (
    FIELD_GETTERS,
    AbortBackward,
    BackwardRequest,
    Cancel,
    Failure,
    Forming,
    Heartbeat,
    Joined,
    Left,
    MarkSends,
    PythonCall,
    PythonRemote,
    Refused,
    Register,
    ReleaseContexts,
    Reply,
    RRefFetch,
    Welcome,
    make_message,
)  # fmt: skip
from zrpc.wire.payload import Payload, open_payload, seal
from zrpc.wire.unanswered import CallsUnanswered
from zrpc_broker.directory import Directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.fuzz.mutation import Frames
    from zrpc.wire.envelope import Buffer

assert exceptions is not None  # imported, it makes exceptions again
warnings.filterwarnings("ignore")
torch.set_num_threads(1)

A, B = b"A" * 8, b"B" * 8
USED_MAX_NUMEL = 1 << 16
_SECRET = Secret("a secret that no input knows")


@dataclass(frozen=True)
class Target:
    """One decoder.

    Attributes:
        name: what it decodes.
        seeds: valid messages, as frames.
        run: decodes one, and gives how many bytes of memory what came of it holds beside Python's own.
        raises: what it may raise.
    """

    name: str
    seeds: list[Frames]
    run: Callable[[Frames], int]
    raises: tuple[type[Exception], ...] = (ProtocolError,)


def as_received(frames: Sequence[bytes]) -> list[Buffer]:
    """Frames as the transport hands them on: large ones as views that can be written to."""
    return [frame if len(frame) <= 4096 else memoryview(bytearray(frame)) for frame in frames]


def _frames_of(envelope: Envelope) -> Frames:
    return [bytes(frame) for frame in encode(envelope)]


_ID = GlobalId(1, 7, A)
_CARD = {"address": "tcp://127.0.0.1:5000", "host": "h", "devices": [], "device_count": 0, "device_maps": {}}
_EXTRAS = {"rref": [b"x" * 60], "autograd": [5, [1, 2, A]], "profile": [1, [True, False]]}


def _tensors() -> dict[str, list[torch.Tensor]]:
    dense = torch.arange(24.0).reshape(4, 6)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1, 3], [2, 0, 5]]), torch.ones(3), (4, 6), check_invariants=True)
    scales, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    return {
        "dense": [dense, torch.ones(3), torch.tensor(5), torch.zeros(0, 3)],
        "grad": [torch.ones(2, 2, requires_grad=True)],
        "kinds": [torch.ones(4, dtype=dtype) for dtype in (torch.int8, torch.bool, torch.bfloat16, torch.complex64)],
        "views": [dense.t(), dense[:, 1:3], dense[0].expand(5, 6), torch.ones(2, dtype=torch.complex64).conj()],
        "one view": [torch.arange(12.0).reshape(3, 4).t()],
        "large": [torch.ones(3000), torch.ones(2, 700), torch.ones(6000)],
        "tiny": [torch.ones(200) for _ in range(20)],
        "many": [torch.ones(2) for _ in range(300)],
        "coo": [sparse, sparse.coalesce()],
        "compressed": [dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((2, 3))],
        "quantized": [torch.quantize_per_tensor(dense, 0.5, 1, dtype) for dtype in (torch.qint8, torch.quint4x2)],
        "channels": [torch.quantize_per_channel(dense, scales, zeros, 0, torch.quint8)],
        "meta": [torch.empty(3, 4, device="meta")],
        "nested": [torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])],
    }


def _sent(tensors: list[torch.Tensor]) -> Frames:
    return _frames_of(seal(Reply(), 3, pickling.dumps(tensors), {"autograd": [1, [1, 2, A]]}))


# ---- the wire --------------------------------------------------------------------------------------------------------


def _use_message(frames: Frames) -> int:
    envelope = decode(as_received(frames))
    repr(envelope.message)
    return 0


def _use_tensors(frames: Frames) -> int:
    payload = open_payload(decode(as_received(frames)))
    for tensor in payload.tensors:
        _use(tensor)
    return _held(payload.tensors)


def _held(tensors: Sequence[torch.Tensor]) -> int:
    """How many bytes the memory of `tensors` has, each piece once."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
            continue
        storage: Any = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def _use(tensor: torch.Tensor) -> None:
    """Read all of `tensor`: where it sees memory that is not its own, this process may end."""
    if tensor.is_nested:
        for part in tensor.unbind():
            _use(part)
        return
    if tensor.is_meta or tensor.numel() > USED_MAX_NUMEL:
        return
    with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):  # not every kind can do everything
        if tensor.layout is not torch.strided:
            tensor.detach().to_dense()
        elif tensor.is_quantized:
            tensor.dequantize()
        else:
            tensor.detach().clone().contiguous()


def _use_values(frames: Frames) -> int:
    tensors = [torch.ones(1), torch.ones(2)]
    repr(values.unpack(Payload(frames[0] if frames else b"", tensors)))
    return 0


def _use_fields(frames: Frames) -> int:
    for frame in frames:
        try:
            header = packed_bytes.unpack(frame)
            code, fields = header
        except Exception as error:
            raise ProtocolError("not for this target") from error
        message = make_message(code, fields)
        repr(message)
        if isinstance(message, CallsUnanswered):
            for _, forks in message:
                for fork in forks:
                    ForkData.unpack(fork)
    return 0


_PICKLED = pickle.dumps(7, 5)
_PREFIX = struct.Struct("<2sQ")


def _use_exceptions(frames: Frames) -> int:
    """The first frame is the table of exceptions. Pickles themselves stay as they are: a pickle runs what it says."""
    try:
        states = _with_pickles(descriptor_of(frames[0] if frames else b""))
        repr(states)
    except RecursionError as error:  # of this target, or of pickle
        raise ProtocolError("not for this target") from error
    table = pickle.dumps([tuple(state) if isinstance(state, list) else state for state in states], 5)
    stream = pickling.dumps(ValueError("x")).data
    _, length = _PREFIX.unpack(stream[: _PREFIX.size])
    data = _PREFIX.pack(b"\xc1\x04", len(table)) + table + bytes(stream[_PREFIX.size + length :])
    del states, table  # what was made of the input for the decoder is not the decoder's
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    repr(pickling.loads(Payload(data)))
    return 0


def _with_pickles(value: Any) -> Any:
    """`value` with a harmless pickle in the place of whatever may be unpickled."""
    if isinstance(value, bytes):
        return _PICKLED
    if isinstance(value, list):
        return [_with_pickles(one) for one in value]
    return {key: _with_pickles(one) for key, one in value.items()} if isinstance(value, dict) else value


def _exceptions() -> list[Frames]:
    error: BaseException = KeyError("k", 1)
    error.__cause__ = OSError(2, "no", "file")
    error.__dict__["note"] = 5
    group = ExceptionGroup("several", [error, ValueError("v")])
    tables = []
    for one in (ValueError("a", 1), error, group):
        data = bytes(pickling.dumps(one).data)
        _, length = _PREFIX.unpack(data[: _PREFIX.size])
        tables.append([msgpack.packb(pickle.loads(data[_PREFIX.size : _PREFIX.size + length]))])
    return tables


def _use_streams(frames: Frames) -> int:
    """The first frame says where the pieces of a stream are, or a table of exceptions is; anything else is a pickle."""
    data = frames[0] if frames else b""
    if len(data) != _PREFIX.size or data[:1] != b"\xc1":
        raise ProtocolError("not for this target")
    buffers = [_PICKLED[:5], _PICKLED[5:], pickle.dumps([], 5)]
    repr(pickling.loads(Payload(data if data[1:2] == b"\x03" else data + _PICKLED, [], buffers)))
    return 0


def _use_gradients(frames: Frames) -> int:
    tensors = [torch.ones(2), torch.ones(3)]
    gradients.unpack_several(Payload(frames[0] if frames else b"", tensors))
    return 0


def _use_rref(frames: Frames) -> int:
    for frame in frames:
        repr(ForkData.unpack(frame))
    return 0


def _use_autograd(frames: Frames) -> int:
    for frame in frames:
        try:
            meta = packed_bytes.unpack(frame)
        except Exception as error:
            raise ProtocolError("not for this target") from error
        repr(hook.parse(meta))
    return 0


# ---- membership and the broker ---------------------------------------------------------------------------------------


def _use_records(frames: Frames) -> int:
    for frame in frames:
        roster = unpack_roster(frame)
        if isinstance(roster, StartFailure):
            raise RendezvousError(roster.why)
        for raw in roster:
            Placement.of(Record.unpack(raw).member)
    return 0


def _use_codes(frames: Frames) -> int:
    """What strangers wrote into a store."""
    for frame in frames:
        store = dist.HashStore()
        store.set("key", frame)
        AuthenticatedStore(store, _SECRET).get("key")
    return 0


def _use_broker(frames: Frames) -> int:
    """The broker's front: what workers say to it, and what it says of that to others."""
    directory = Directory(1.0)
    envelope = decode(as_received(frames))
    if isinstance(envelope.message, Register):
        for life in (A, B):
            for action in directory.register(life, envelope.message):
                message = getattr(action, "message", None)
                if message is not None:
                    encode(Envelope(message, envelope.call_id))
        directory.heartbeat(A)
        directory.leave(A)
        directory.lose(B, "gone")
    return 0


def _use_brokered(frames: Frames) -> int:
    """What the broker says to workers."""
    message = decode(as_received(frames)).message
    if isinstance(message, Welcome):
        for member in members_of(message.members):
            Placement.of(member)
        interval_s(message.heartbeat_interval_s)
    elif isinstance(message, Joined):
        member_of(message.name, message.rank, message.incarnation, message.card)
    elif isinstance(message, Forming):
        interval_s(message.heartbeat_interval_s)
        dict.fromkeys(message.names)
    elif isinstance(message, Left | Refused):
        assert message.reason.isprintable()
    return 0


def _targets() -> list[Target]:
    member = Member(WorkerInfo("worker-1", 1), A, _CARD)
    record = Record(member, 2).pack()
    calls = [
        PythonCall(), PythonRemote(_ID, _ID), RRefFetch(_ID, _ID), Failure("ValueError", "text", "Traceback\n"),
        BackwardRequest(5, _ID, _ID, False), ReleaseContexts([1, 2]), AbortBackward(1, _ID, "why"),
        MarkSends(1, _ID, True, [_ID, _ID]), Heartbeat(), Left(A, True, "gone"), Cancel(7),
        CallsUnanswered([[7, [ForkData(1, A, _ID, _ID).pack()]]]),
    ]  # fmt: skip
    register = Register("worker-1", -1, 2, _CARD)
    welcome = Welcome(0, [[A, "worker-1", 0, _CARD], [B, "worker-2", 1, _CARD]], 1.0)
    tensors = [_sent(group) for group in _tensors().values()]
    several: Any = [[_ID, [torch.ones(2), None]], [_ID, [torch.ones(3)]]]
    packed = gradients.pack_several(several)
    assert packed is not None
    operands = [
        ([torch.ones(1), 1, 2.5, "x", (1, (2, torch.float32)), {1: 2, "a": None}], {}),
        [torch.device("cpu"), 3 + 4j, torch.Size([2, 3]), torch.strided, torch.channels_last, list(range(150))],
    ]
    return [
        Target("messages", [
            *(_frames_of(Envelope(one, 7, dict(_EXTRAS), b"data")) for one in calls),
            _frames_of(Envelope(PythonCall(), 7, time_left_ms=60_000)),
        ], _use_message),
        Target("tensors", tensors, _use_tensors),
        Target("fields", [[msgpack.packb([one.CODE, FIELD_GETTERS[type(one)](one)])] for one in calls], _use_fields),
        Target("values", [[bytes(values.pack(one).data)] for one in operands], _use_values),
        Target("exceptions", _exceptions(), _use_exceptions, (ProtocolError, SerializationError)),
        Target("streams", [[b"\xc1\x03" + struct.pack("<II", 0, 2)], [_PREFIX.pack(b"\xc1\x05", 2)]], _use_streams,
               (ProtocolError, SerializationError)),
        Target("gradients", [[bytes(packed.data)]], _use_gradients),
        Target("forks", [[ForkData(1, A, _ID, _ID).pack()]], _use_rref),
        Target("autograd", [[msgpack.packb(meta)] for meta in ([1, [1, 2, A]], [1, None, 1], [1, [1, 2, A], 2, B])],
               _use_autograd),
        Target("chunks", [[*chunk(1, 0, 8, b"1234"), *chunk(1, 4, 8, b"5678"), msgpack.packb([1, 8]), b""],
                          [*chunk(9, 0, 1 << 20, b"x" * 500), *chunk(9, 0, 0, b"")]], use_chunks),
        Target("packets", packet_seeds(), use_packets),
        Target("batches", [[b"\xc1\x03" + msgpack.packb([b"\x98abc"] * 3)], [struct.pack("<BBQ", 0xC1, 1, 5)],
                           [struct.pack("<BBQ", 0xC1, 2, 100)]], use_batch),
        Target("slabs", slab_seeds(), Slabs().run),
        Target("records", [[pack_roster([record, record])], [StartFailure("why", 2).pack()]], _use_records,
               (RefusedError, RendezvousError)),
        Target("codes", [[b"5"], [bytes(40)]], _use_codes, (RefusedError,)),
        Target("broker", [_frames_of(Envelope(one, 7)) for one in (register, Heartbeat())], _use_broker),
        Target("brokered", [_frames_of(Envelope(one, 7)) for one in (
            welcome, Joined(A, "worker-1", 1, _CARD), Forming(["worker-1"], 2, 1.0), Refused("no"), Left(A, True, "x"),
        )], _use_brokered),
    ]  # fmt: skip


TARGETS = {target.name: target for target in _targets()}
