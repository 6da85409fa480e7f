"""Buffers of one message that share memory: laid out by the sender, cut by the receiver."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrpc.errors import ProtocolError
from zrpc.wire.envelope import Buffer, Envelope, decode, encode
from zrpc.wire.messages import Reply
from zrpc.wire.region import ALIGNMENT, MAX_MEMBERS, MAX_NBYTES, MEMBER_MAX_NBYTES, TINY_MAX_NBYTES, Region, cut, gather

SIZES = st.one_of(
    st.integers(0, 200),
    st.sampled_from([TINY_MAX_NBYTES, TINY_MAX_NBYTES + 1, 20_000, MEMBER_MAX_NBYTES, MEMBER_MAX_NBYTES + 1]),
)


def pattern(index: int, nbytes: int) -> bytes:
    return bytes([index % 251]) * nbytes


def arrived(frames: list[Buffer]) -> list[Buffer]:
    """Frames as the transport hands them over: small ones as bytes, others as writable views."""
    return [bytes(frame) if len(frame) <= TINY_MAX_NBYTES else memoryview(bytearray(frame)) for frame in frames]


@given(st.lists(SIZES, max_size=40))
def test_every_buffer_arrives_as_it_was_however_many_there_are(sizes: list[int]) -> None:
    sent: list[Buffer] = [pattern(index, nbytes) for index, nbytes in enumerate(sizes)]
    envelope = decode(arrived(encode(Envelope(Reply(), buffers=sent))))
    assert list(map(bytes, envelope.buffers)) == sent  # type: ignore[arg-type]


@given(st.lists(SIZES, max_size=40), st.integers(0, 3))
def test_every_buffer_arrives_through_shared_memory_too(sizes: list[int], refused: int) -> None:
    """Also where some pieces of memory are refused, and travel as frames."""
    sent: list[Buffer] = [pattern(index, nbytes) for index, nbytes in enumerate(sizes)]
    memory: list[bytearray] = []

    def place(buffer: Any) -> list[Any] | None:
        if len(memory) == refused:
            return None
        memory.append(buffer.joined() if isinstance(buffer, Region) else bytearray(buffer))
        return [len(memory) - 1, len(buffer), -1, -1]

    frames = arrived(encode(Envelope(Reply(), buffers=sent), place))
    envelope = decode(frames, lambda descriptor: memoryview(memory[descriptor[0]]))
    assert list(map(bytes, envelope.buffers)) == sent  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "nbytes"), [(200, 1000), (40, 20_000), (2, 5000)])
def test_many_buffers_are_one_frame(count: int, nbytes: int) -> None:
    assert len(encode(Envelope(Reply(), buffers=[bytes(nbytes)] * count))) == 2


def test_a_few_tiny_buffers_ride_in_the_first_frame() -> None:
    assert len(encode(Envelope(Reply(), buffers=[bytes(1000)] * 12))) == 1


def test_one_buffer_among_tiny_ones_is_a_frame_of_its_own() -> None:
    frames = encode(Envelope(Reply(), buffers=[b"a", large := bytes(5000), b"b"]))
    assert frames[1] is large


def test_a_message_of_very_many_buffers_is_not_cut_by_the_thread_that_reads() -> None:
    assert gather([bytes(100)] * MAX_MEMBERS) is not None
    assert gather([bytes(100)] * (MAX_MEMBERS + 1)) is None


def test_a_kept_buffer_holds_no_more_than_a_bounded_region() -> None:
    buffers = [bytes(100_000)] * 100
    gathered = gather(buffers)
    assert gathered is not None
    assert len(gathered.regions) > 1
    assert all(len(region) <= MAX_NBYTES for region in gathered.regions)
    assert all(entry is not None and entry[1] % ALIGNMENT == 0 for entry in gathered.entries.values())


def test_tiny_buffers_are_read_only_so_that_their_receivers_copy_them() -> None:
    received = decode(arrived(encode(Envelope(Reply(), buffers=[bytes(1000)] * 20 + [bytes(5000)]))))
    assert [memoryview(buffer).readonly for buffer in received.buffers] == [True] * 20 + [False]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([[1, 0, 5000]], "names none"),
        ([[0, 0, 10], bytes(100)], "names none"),
        ([[-1, 0, 10], bytes(100)], "names none"),
        ([[True, 0, 10], bytes(100)], "names none"),
        ([[1, "0", 10], bytes(100)], "names none"),
        ([[1, 95, 10], bytes(100)], "does not lie in its region of 100 bytes"),
        ([[1, -5, 10], bytes(100)], "does not lie in its region"),
        ([[1, 50, -10], bytes(100)], "does not lie in its region"),
        ([[2, 0, 10], [2, 0, 10], [2, 0, 10]], "names none"),
        ([[2, 0, 10], bytes(5), [3, 0, 10], bytes(10)], "names none"),
    ],
)
def test_a_member_that_lies_in_no_region_is_refused(entries: list[Any], words: str) -> None:
    members = [index for index, entry in enumerate(entries) if isinstance(entry, list)]
    with pytest.raises(ProtocolError, match=words):
        cut(entries, members, [], True)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([None, None, bytes(10), b"\5\0"], "2 packed buffers came, and their sizes are"),
        ([None, None, bytes(10), "5050"], "their sizes are '5050'"),
        ([None, b"\5\0"], "their sizes are"),
        ([None, None, bytes(10), b"\5\0\6\0"], "of 11 bytes do not fill their region of 10"),
        ([None, None, bytes(10), b"\5\0\4\0"], "of 9 bytes do not fill their region of 10"),
        ([None, None, [0, 0, 5], b"\5\0\4\0"], "names a member"),
    ],
)
def test_packed_buffers_that_do_not_fill_their_region_are_refused(entries: list[Any], words: str) -> None:
    packed = [index for index, entry in enumerate(entries) if entry is None]
    with pytest.raises(ProtocolError, match=words):
        cut(entries, [], packed, True)


def test_members_of_memory_that_cannot_be_opened_are_told_of_by_its_own_error() -> None:
    def fetch(descriptor: list[Any]) -> Buffer:
        raise ProtocolError("the file of a slab did not come")

    frames = arrived(encode(Envelope(Reply(), buffers=[bytes(5000)] * 20), lambda buffer: [7, len(buffer), -1, 0]))
    damage = decode(frames, fetch).damage
    assert damage is not None
    assert "did not come" in str(damage)
