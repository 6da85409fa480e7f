"""The envelope: what it is byte for byte, and that damaged bytes are refused and nothing else."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import example, given

from zrpc.errors import ProtocolError
from zrpc.ids import GlobalId
from zrpc.wire.envelope import INLINE_MAX_NBYTES, Arriving, Buffer, Envelope, HandedBack, decode, encode, nbytes_of
from zrpc.wire.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    AbortBackward,
    BackwardRequest,
    BuiltinCall,
    BuiltinRemote,
    Cancel,
    Failure,
    Forming,
    Heartbeat,
    JoinContexts,
    Joined,
    Leave,
    Left,
    MarkSends,
    Message,
    PythonCall,
    PythonRemote,
    Refused,
    Register,
    ReleaseContexts,
    Reply,
    RRefBackward,
    RRefChildAccept,
    RRefCreationFailed,
    RRefFetch,
    RRefForkRequest,
    RRefUserDelete,
    Welcome,
    make_message,
)
from zrpc.wire.observing import Attach, Attached, Look, Seen
from zrpc.wire.payload import open_payload
from zrpc.wire.region import MEMBER_MAX_NBYTES
from zrpc.wire.rejoining import Locate, Located, Rejoin
from zrpc.wire.unanswered import CallsUnanswered

if TYPE_CHECKING:
    from collections.abc import Sequence

WHO = b"12345678"
R, F = GlobalId(1, 2, WHO), GlobalId(3, 70_000, b"abcdefgh")

GOLDEN: list[tuple[Message, str]] = [
    (PythonCall(True), "9801010791c3c09090c400"),
    (BuiltinCall("aten::add"), "9801020791a96174656e3a3a616464c09090c400"),
    (PythonRemote(R, F, False), "9801030793930102c40831323334353637389303ce00011170c4086162636465666768c2c09090c400"),
    (
        BuiltinRemote(R, F, "aten::mul"),
        "9801040793930102c40831323334353637389303ce00011170c4086162636465666768a96174656e3a3a6d756cc09090c400",
    ),
    (Reply(), "98010a0790c09090c400"),
    (
        Failure("KeyError", "'a'", "Traceback"),
        "98010b0793a84b65794572726f72a3276127a954726163656261636bc09090c400",
    ),
    (Cancel(70_000), "98010c0791ce00011170c09090c400"),
    (RRefFetch(R, F), "9801140792930102c40831323334353637389303ce00011170c4086162636465666768c09090c400"),
    (RRefForkRequest(R, F), "9801150792930102c40831323334353637389303ce00011170c4086162636465666768c09090c400"),
    (RRefChildAccept(F), "98011607919303ce00011170c4086162636465666768c09090c400"),
    (RRefUserDelete(R, F), "9801170792930102c40831323334353637389303ce00011170c4086162636465666768c09090c400"),
    (RRefCreationFailed(R), "9801180791930102c4083132333435363738c09090c400"),
    (CallsUnanswered([[5, [b"fork"]], [7, []]]), "980119079192920591c404666f726b920790c09090c400"),
    (
        BackwardRequest(1 << 48, R, F, True),
        "98011e0794cf0001000000000000930102c40831323334353637389303ce00011170c4086162636465666768c3c09090c400",
    ),
    (
        RRefBackward(R, F, 5, False),
        "98011f0794930102c40831323334353637389303ce00011170c408616263646566676805c2c09090c400",
    ),
    (ReleaseContexts([5, 7]), "9801200791920507c09090c400"),
    (JoinContexts([5, 7]), "9801230791920507c09090c400"),
    (AbortBackward(5, F, "why"), "9801210793059303ce00011170c4086162636465666768a3776879c09090c400"),
    (
        MarkSends(5, F, True, [R, F]),
        "9801220794059303ce00011170c4086162636465666768c392930102c40831323334353637389303ce00011170c4086162636465666768c09090c400",
    ),
    (
        Register("trainer:0", -1, 2, {"address": "tcp://127.0.0.1:5", "devices": []}, "run"),
        "9801280795a9747261696e65723a30ff0282a761646472657373b17463703a2f2f3132372e302e302e313a35a76465766963657390a3"
        "72756ec09090c400",
    ),
    (
        Welcome(1, [[WHO, "a", 0, {}]], 2.0, WHO),
        "9801290794019194c4083132333435363738a1610080cb4000000000000000c4083132333435363738c09090c400",
    ),
    (Refused("taken"), "98012a0791a574616b656ec09090c400"),
    (Joined(WHO, "a", 0, {"host": "h"}), "98012b0794c4083132333435363738a1610081a4686f7374a168c09090c400"),
    (Left(WHO, True, "silent"), "98012c0793c4083132333435363738c3a673696c656e74c09090c400"),
    (Leave(), "98012d0790c09090c400"),
    (Heartbeat(), "98012e0790c09090c400"),
    (Forming(["a", "b"], 3, 2.0), "98012f079392a161a16203cb4000000000000000c09090c400"),
    (
        Rejoin("a", 0, 2, {}, "run", WHO, [[WHO, "b", 1]], [WHO]),
        "9801300798a161000280a372756ec40831323334353637389193c4083132333435363738a1620191c4083132333435363738c09090c400",
    ),
    (Locate("run"), "9801310791a372756ec09090c400"),
    (Located(3), "980132079103c09090c400"),
    (Attach("run"), "98013c0791a372756ec09090c400"),
    (
        Attached([[WHO, "a", 0, {}]], 2, "complete"),
        "98013d07939194c4083132333435363738a161008002a8636f6d706c657465c09090c400",
    ),
    (
        Look("status", {"of": 1}, "tcp://1.2.3.4:5"),
        "98013e0793a673746174757381a26f6601af7463703a2f2f312e322e332e343a35c09090c400",
    ),
    (Seen({"time": 1.5}), "98013f079181a474696d65cb3ff8000000000000c09090c400"),
]
"""Each message with call id 7 and nothing beside it. Other bytes mean another protocol: raise PROTOCOL_VERSION."""

FULL = Envelope(
    Reply(),
    300,
    {"autograd": [1, [2, 3]]},
    b"data",
    [[0, "float32", [2], False, 0]],
    [WHO, bytes(range(256)) * 32, b"ab"],
)
FULL_HEADER = (
    "98010acd012c9081a86175746f677261649201920203919500a7666c6f617433329102c20093c4083132333435363738cd2000c4026162c404"
    "64617461"
)


def header(**changes: Any) -> list[Any]:
    """The parts of a `Reply`'s header, some of them changed."""
    parts = {"version": PROTOCOL_VERSION, "code": 10, "call_id": 1, "fields": [], "extras": None, "table": []}
    return list((parts | {"buffers": [], "data": b""} | changes).values())


def packed(parts: object) -> list[Buffer]:
    return [msgpack.packb(parts)]


def _values(message: Message) -> list[Any]:
    return [getattr(message, field.name) for field in dataclasses.fields(message)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda value: type(value).__name__)
def test_every_message_has_its_bytes(message: Message, golden: str) -> None:
    assert encode(Envelope(message, 7)) == [bytes.fromhex(golden)]
    received = decode([bytes.fromhex(golden)])
    assert received == Envelope(message, 7, None, b"", [], [])
    assert [type(value) for value in _values(received.message)] == [type(value) for value in _values(message)]


def test_no_message_is_without_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(MESSAGES.values()), "add the new message to GOLDEN"


def test_everything_that_rides_beside_a_message_has_its_bytes() -> None:
    frames = encode(FULL)
    assert [frames[0], len(frames[1])] == [bytes.fromhex(FULL_HEADER), 8192]
    assert decode(frames) == FULL


@pytest.mark.parametrize("nbytes", [0, 1, INLINE_MAX_NBYTES, INLINE_MAX_NBYTES + 1, 1 << 20])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_small_buffers_ride_inside_and_large_ones_are_frames_of_their_own(nbytes: int, kind: type[Buffer]) -> None:
    memory = bytearray(b"x") * nbytes
    buffer = memory if kind is bytearray else kind(memory)
    frames = encode(Envelope(Reply(), buffers=[buffer]))
    if nbytes > INLINE_MAX_NBYTES:
        assert frames[1] is buffer
    else:
        assert len(frames) == 1
    assert bytes(decode(frames).buffers[0]) == bytes(memory)


def test_large_buffers_are_received_as_the_frames_that_came() -> None:
    large, small = bytearray(MEMBER_MAX_NBYTES + 1), b"small"
    frames = encode(Envelope(Reply(), buffers=[large, small, large]))
    received = decode([frames[0], view := memoryview(large), view])
    assert received.buffers == [view, small, view]
    assert received.buffers[0] is view


def test_a_message_may_place_its_large_buffers_elsewhere() -> None:
    elsewhere: list[Buffer] = []

    def place(buffer: Buffer) -> list[Any] | None:
        elsewhere.append(buffer)
        return ["slab", len(elsewhere) - 1] if len(elsewhere) == 1 else None

    buffers: list[Buffer] = [b"a" * (MEMBER_MAX_NBYTES + 1), b"b" * (MEMBER_MAX_NBYTES + 2), b"c"]
    frames = encode(Envelope(Reply(), buffers=buffers), place)
    assert len(frames) == 2
    assert decode(frames, lambda descriptor: elsewhere[descriptor[1]]).buffers == buffers
    with pytest.raises(ProtocolError, match="shared memory"):
        decode(frames)


def test_a_buffer_that_is_handed_back_travels_as_its_descriptor_alone() -> None:
    descriptor = [7, 100_000, -2, -1]
    buffers: list[Buffer | Arriving | HandedBack] = [b"small", HandedBack(descriptor, 90_000)]
    frames = encode(Envelope(Reply(), buffers=buffers))
    assert len(frames) == 1

    def fetch(came: list[Any]) -> Buffer:
        assert came == descriptor
        return b"home"

    assert decode(frames, fetch).buffers == [b"small", b"home"]
    assert nbytes_of(buffers) == 90_005


def test_what_msgpack_cannot_carry_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ProtocolError, match="Reply"):
        encode(Envelope(Reply(), extras={"hook": object()}))
    with pytest.raises(ProtocolError, match="ReleaseContexts"):
        encode(Envelope(ReleaseContexts([1 << 64])))
    assert decode(encode(Envelope(ReleaseContexts([1])))).message == ReleaseContexts([1]), (
        "the packer is usable afterwards"
    )


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "does not begin with a msgpack header"),
        ([b""], "does not begin with a msgpack header"),
        ([b"\xc1"], "does not begin with a msgpack header"),
        ([bytes.fromhex(FULL_HEADER)[:-1]], "does not begin with a msgpack header"),
        ([bytes.fromhex(FULL_HEADER) + b"\x00"], "does not begin with a msgpack header"),
        (packed({}), "speaks version"),
        (packed([]), "speaks version"),
        (packed(header(version=PROTOCOL_VERSION + 1)), f"speaks version {PROTOCOL_VERSION + 1} .* version"),
        (packed(header()[:-1]), "7 fields instead of 8"),
        (packed([*header(), 0, 0]), "10 fields instead of 8"),
        (packed([*header(), -1]), "-1 milliseconds left"),
        (packed([*header(), True]), "True milliseconds left"),
        (packed([*header(), 1.5]), "1.5 milliseconds left"),
        (packed([*header(), 10**12 + 1]), "1000000000001 milliseconds left"),
        (packed(header(code=9999)), "code 9999 is not known"),
        (packed(header(code=[10])), "is not known"),
        (packed(header(code=True)), "is not known"),
        (packed(header(call_id=[1])), "wrong type"),
        (packed(header(extras=[])), "wrong type"),
        (packed(header(table={})), "wrong type"),
        (packed(header(buffers=3)), "wrong type"),
        (packed(header(data="text")), "wrong type"),
        (packed(header(fields=[1])), "do not make a Reply"),
        (packed(header(fields=None)), "do not make a Reply"),
        (packed(header(code=21, fields=[[1, 2]])), "do not make a RRefForkRequest"),
        (packed(header(code=21, fields=[[1, 2], [3]])), "not a global id"),
        (packed(header(code=21, fields=[[1, 2], [3, "4"]])), "not a global id"),
        (packed(header(code=34, fields=[1, [1, 2], True, [5]])), "not a global id"),
        (packed(header(code=40, fields=["a", "0", 2, {}, "g"])), "do not make a Register"),
        (packed(header(code=40, fields=["a", 0, 2, {}, []])), "do not make a Register"),
        (packed(header(buffers=[5000])), "should have 5000 bytes, and no frame came"),
        ([*packed(header(buffers=[5000])), bytes(4999)], "should have 5000 bytes, and 4999 bytes came"),
        ([*packed(header(buffers=[5000, 5000])), bytes(5000)], "buffer 1 .* no frame came"),
        ([*packed(header(buffers=["5000"])), bytes(5000)], "buffer 0 should have"),
        ([*packed(header()), b""], "1 frames more"),
        ([*packed(header(buffers=[5000])), bytes(5000), b"", b""], "2 frames more"),
    ],
)
def test_damaged_messages_are_refused_with_words(frames: Sequence[Buffer], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode(frames)


@pytest.mark.parametrize(("left_ms", "golden"), [(0, "00"), (60_000, "cdea60"), (10**12, "cf000000e8d4a51000")])
def test_a_call_of_users_carries_what_is_left_of_its_time_behind_all_else(left_ms: int, golden: str) -> None:
    """It is a whole number of milliseconds; messages that are none of users' calls have no such field."""
    (frame,) = encode(Envelope(PythonCall(), 7, time_left_ms=left_ms))
    assert bytes(frame).hex() == "9901010791c2c09090c400" + golden
    assert decode([frame]).time_left_ms == left_ms
    assert decode(encode(Envelope(PythonCall(), 7))).time_left_ms is None


def test_a_whole_number_stands_for_a_float() -> None:
    message = decode(packed(header(code=47, fields=[["a"], 2, 1]))).message
    assert message == Forming(["a"], 2, 1.0)


def _decodes_or_is_refused(frames: Sequence[Buffer]) -> None:
    try:
        decode(frames)
    except ProtocolError:
        return


@given(
    which=st.integers(0, len(GOLDEN)),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 120),
)
def test_changed_bytes_are_decoded_or_refused(which: int, changes: list[tuple[int, int]], cut: int) -> None:
    rest: list[Buffer] = []
    if which == len(GOLDEN):
        raw, rest = bytearray.fromhex(FULL_HEADER), [bytes(8192)]
    else:
        raw = bytearray.fromhex(GOLDEN[which][1])
    for at, value in changes:
        raw[at % len(raw)] = value
    _decodes_or_is_refused([bytes(raw), *rest])
    _decodes_or_is_refused([bytes(raw[: max(1, len(raw) - cut)]), *rest])


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3),
    max_leaves=8,
)


@given(
    code=st.sampled_from(sorted(MESSAGES)),
    fields=st.lists(anything, max_size=5),
    buffers=st.lists(anything, max_size=3),
)
@example(code=1, fields=[True], buffers=[[]])
def test_other_parts_are_decoded_or_refused(code: int, fields: list[Any], buffers: list[Any]) -> None:
    _decodes_or_is_refused([*packed(header(code=code, fields=fields, buffers=buffers)), bytes(5000)])


@given(header=anything)
def test_other_headers_are_refused(header: Any) -> None:
    with pytest.raises(ProtocolError):
        decode([msgpack.packb(header)])


def test_memory_that_cannot_be_opened_damages_the_message_and_leaves_its_head_readable() -> None:
    def fetch(descriptor: list[Any]) -> Buffer:
        if descriptor[0] == 1:
            raise ProtocolError("no such slab")
        return b"here"

    envelope = decode(packed(header(code=10, call_id=7, fields=[], buffers=[[1, 2], [3, 4]])), fetch)
    assert envelope.call_id == 7
    assert envelope.buffers[1] == b"here"
    with pytest.raises(ProtocolError, match="no such slab"):
        open_payload(envelope)


def test_fields_nested_beyond_measure_are_refused_as_others_are() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    for code, values in ((1, [nested]), (nested, []), (1, nested)):
        with pytest.raises(ProtocolError):
            make_message(code, values)


def test_a_large_message_leaves_no_memory_behind() -> None:
    def resident_nbytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    encode(Envelope(PythonCall(False), 1, data=b"warm"))
    before = resident_nbytes()
    for _ in range(3):
        encode(Envelope(PythonCall(False), 1, data=bytes(256 << 20)))
    assert resident_nbytes() - before < 128 << 20
