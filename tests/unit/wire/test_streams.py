"""Large pieces of a pickle stream travel as buffers."""

from __future__ import annotations

import array
import pickle
from typing import Any

import numpy as np
import pytest

from tests.unit.wire.travel import travel
from zrpc.errors import ProtocolError, SerializationError
from zrpc.wire import pickling
from zrpc.wire.payload import Payload
from zrpc.wire.streams import HUGE_MIN_NBYTES, PIECE_MIN_NBYTES, Reader, Writer, place, placed

LARGE = PIECE_MIN_NBYTES


def round_trip(value: Any) -> Any:
    return pickling.loads(travel(pickling.dumps(value)))


class Holder:
    """Something that holds bytes."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize("nbytes", [0, 1, 65_536, LARGE - 1, LARGE, 3 * LARGE, HUGE_MIN_NBYTES + 4096])
@pytest.mark.parametrize("make", [bytes, bytearray, lambda n: array.array("B", bytes(n)), lambda n: "x" * n])
def test_large_values_leave_the_stream_and_arrive_as_they_were(make: Any, nbytes: int) -> None:
    """Alone, in containers and in objects; large ones are no part of what is copied into a message."""
    value = make(nbytes)
    for before in (value, [value, 1], {"a": (value, "b")}):
        payload = pickling.dumps(before)
        if nbytes >= LARGE:
            assert len(payload.data) < 100
        assert pickling.loads(travel(payload)) == before
    after = round_trip(Holder(value)).held
    assert type(after) is type(value)
    assert after == value


def test_large_arguments_of_a_function_leave_the_stream() -> None:
    """Also those of calls that are not pickled if they are small."""
    payload = pickling.dumps_call((round_trip, (bytes(LARGE),), {"x": "y" * LARGE}))
    assert len(payload.data) < 100
    function, args, kwargs = pickling.loads(travel(payload))
    assert (function, args, kwargs) == (round_trip, (bytes(LARGE),), {"x": "y" * LARGE})


def test_what_is_there_twice_arrives_as_one() -> None:
    """Out of the stream or in it: identity is that of pickle."""
    value = bytearray(LARGE)
    one, (other,), whole = round_trip([value, [value], bytes(value)])
    assert one is other
    assert one == whole


def test_bytes_are_not_copied_and_what_can_be_written_to_is() -> None:
    """What the caller does to a bytearray after the call does not reach the callee, and it may change its size."""
    unchanging, changing = bytes(LARGE), bytearray(LARGE)
    payload = pickling.dumps([unchanging, changing])
    assert any(memoryview(buffer).obj is unchanging for buffer in payload.buffers)
    changing[0] = 9
    changing.clear()
    assert pickling.loads(travel(payload))[1] == bytearray(LARGE)


def test_a_large_stream_of_small_things_is_no_part_of_the_header() -> None:
    """Frame 0 is bounded by what msgpack can hold."""
    value = [str(number) for number in range(100_000)]
    payload = pickling.dumps(value)
    assert len(payload.data) < 100
    assert pickling.loads(travel(payload)) == value


def test_large_bytes_arrays_and_small_things_travel_together() -> None:
    """The buffers of arrays and the pieces of the stream keep apart."""
    value = [np.arange(LARGE), bytes(LARGE), np.arange(3), "x", bytearray(LARGE), list(range(100_000))]
    after = round_trip(value)
    for one, other in zip(value, after, strict=True):
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


@pytest.mark.parametrize("nbytes", [0, 10, 50_000, 3 * LARGE])
@pytest.mark.parametrize("make", [bytes, bytearray])
def test_pickle_buffers_arrive_as_pickle_says(make: Any, nbytes: int) -> None:
    """`bytes` of memory that is read-only, else `bytearray`; also where the memory is that of an array."""
    raw = make(nbytes)
    for buffer in (pickle.PickleBuffer(raw), pickle.PickleBuffer(np.frombuffer(raw, np.uint8)) if nbytes else None):
        if buffer is not None:
            alone, inside = round_trip(buffer), round_trip([buffer])[0]
            assert type(alone) is type(inside) is make
            assert alone == inside == raw


@pytest.mark.parametrize("is_writable", [False, True])
@pytest.mark.parametrize("dtype", ["f8", ">i2", "O", "V3", "S5", "datetime64[s]", [("a", "i4"), ("b", "f8")]])
@pytest.mark.parametrize("rows", [0, 1, 3, 200_000])
def test_arrays_arrive_as_pickle_makes_them(rows: int, dtype: Any, is_writable: bool) -> None:
    """Dtype, order, and whether they can be written to."""
    for order in ("C", "F"):
        before = np.zeros((rows, 2), dtype=dtype, order=order)  # type: ignore[call-overload]
        before.flags.writeable = is_writable
        expected = pickle.loads(pickle.dumps(before, 5))
        after, again = round_trip([before, before])
        assert after is again
        assert (after.dtype, after.shape, after.strides) == (expected.dtype, expected.shape, expected.strides)
        assert after.flags.writeable == expected.flags.writeable


def test_a_memoryview_is_refused_as_pickle_refuses_it() -> None:
    """It is no value."""
    with pytest.raises(SerializationError, match="cannot pickle memoryview objects"):
        pickling.dumps([memoryview(b"x")])


def test_pieces_are_read_across_their_ends() -> None:
    """Whatever is asked for at once; at the end there is less."""
    whole = bytes(range(256))
    for size in (1, 7, 256, 300):
        reader = Reader([whole[:3], b"", whole[3:100], whole[100:]])
        read = b""
        while part := bytes(reader.read(size)):
            read += part
        assert read == whole
    target = bytearray(300)
    assert Reader([whole[:9], whole[9:]]).readinto(target) == 256
    assert target[:256] == whole


def test_a_stream_whose_pieces_are_not_there_is_refused() -> None:
    """And so is one that is damaged."""
    payload = pickling.dumps(bytes(LARGE))
    with pytest.raises(ProtocolError, match="buffers"):
        placed(place(1, 2), [b"", b""])
    with pytest.raises(ProtocolError):
        pickling.loads(Payload(payload.data, [], payload.buffers[:1]))
    with pytest.raises(ProtocolError):
        pickling.loads(Payload(bytes(payload.data) + b"x", [], payload.buffers))
    with pytest.raises(SerializationError):
        pickling.loads(Payload(payload.data, [], [b"x"] * len(payload.buffers)))


def test_a_writer_joins_what_is_small() -> None:
    """Neighbours of less than a piece become one."""
    writer = Writer()
    for piece in (b"a", b"b", bytes(LARGE), b"c", bytearray(b"d")):
        writer.write(piece)
    assert writer.is_large()
    assert [len(piece) for piece in writer.joined()] == [2, LARGE, 2]
    assert writer.whole() == b"ab" + bytes(LARGE) + b"cd"
