"""Records that others wrote are read if they are ones, and else refused with words that say what is wrong."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from zrpc.errors import ProtocolError
from zrpc.ids import WorkerInfo
from zrpc.membership import records
from zrpc.membership.group import Member

A = b"A" * 8
CARD = {"address": "tcp://h:1", "device_count": 2, "devices": ["cuda:0"], "device_maps": {"b": {"cuda:0": "cuda:1"}}}


def test_a_record_comes_back_as_it_was() -> None:
    member = Member(WorkerInfo("a", 3), A, CARD)
    assert records.unpack(records.pack(member, 4)) == (member, 4)
    assert records.unpack_roster(msgpack.packb([records.pack(member, 4)])) == [(member, 4)]


@pytest.mark.parametrize(
    "fields",
    [
        ["a", 0, A],
        ["a", 0, A[:7], CARD],
        ["a", -1, A, CARD],
        ["a", 1 << 40, A, CARD],
        ["a", True, A, CARD],
        ["a b\x1b", 0, A, CARD],
        ["a" * 1000, 0, A, CARD],
        [b"a", 0, A, CARD],
        ["a", 0, A, []],
        ["a", 0, A, {"address": 5}],
        ["a", 0, A, {"device_count": -1}],
        ["a", 0, A, {"device_count": 1 << 40}],
        ["a", 0, A, {"devices": "cuda:0"}],
        ["a", 0, A, {"devices": [0]}],
        ["a", 0, A, {"device_maps": {"b": ["cuda:0"]}}],
        ["a", 0, A, {"device_maps": {"b": {"cuda:0": 1}}}],
    ],
)
def test_what_cannot_be_a_worker_is_refused(fields: list[Any]) -> None:
    """Names, ranks, lives and what is read of cards: of every wrong type, and out of their ranges."""
    with pytest.raises(ProtocolError) as refused:
        records.unpack(msgpack.packb([*fields, 2]))
    assert str(refused.value).isprintable()
    with pytest.raises(ProtocolError):
        records.members_of([fields])


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"\xdd\xff\xff\xff\xff", msgpack.packb(5), msgpack.packb([5]), msgpack.packb([["a"]])]
)
def test_a_roster_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        records.unpack_roster(raw)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_broker_cannot_ask_for_an_interval_that_is_none(value: float) -> None:
    with pytest.raises(ProtocolError):
        records.interval_s(value)


@pytest.mark.parametrize("raw", [b"", b"-1", b"1e9", b"9" * 19, "٣".encode(), b"\x00"])
def test_a_counter_of_a_store_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        records.number(raw, "world_size")


@pytest.mark.parametrize("text", ["", "zz", "41" * 7, "41" * 9, "\udc80"])
def test_a_life_in_a_store_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        records.incarnation_of(text)
