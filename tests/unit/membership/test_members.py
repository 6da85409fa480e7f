"""What others say of members is taken if it can be, and else refused with words that say what is wrong."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from zrpc.errors import ProtocolError, RefusedError
from zrpc.membership import members
from zrpc.membership.records import Record

A = b"A" * 8
CARD = {"address": "tcp://h:1", "device_count": 2, "devices": ["cuda:0"], "device_maps": {"b": {"cuda:0": "cuda:1"}}}


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
        members.members_of([[fields[2], fields[0], fields[1], *fields[3:]]])
    assert str(refused.value).isprintable()
    with pytest.raises(RefusedError) as unreadable:
        Record.unpack(msgpack.packb([*fields, 2, ""]))
    assert str(unreadable.value).isprintable()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_broker_cannot_ask_for_an_interval_that_is_none(value: float) -> None:
    with pytest.raises(ProtocolError):
        members.interval_s(value)
