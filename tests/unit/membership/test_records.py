"""What workers write of themselves: it comes back as it was, and nothing else is read."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zrpc.errors import RefusedError
from zrpc.ids import WorkerInfo
from zrpc.membership.group import Member
from zrpc.membership.records import Failure, Record, pack_roster, unpack_roster

LIFE = b"12345678"
RECORD = Record(Member(WorkerInfo("a", 3), LIFE, {"address": "tcp://h:1", "n": 1, "raw": b"\0"}), 4, "00ff")


def test_a_record_and_a_roster_come_back_as_they_were() -> None:
    assert Record.unpack(RECORD.pack()) == RECORD
    assert unpack_roster(pack_roster([b"x", b""])) == [b"x", b""]
    assert unpack_roster(Failure("why", 2).pack()) == Failure("why", 2)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        "text",
        ["a", 0, LIFE, {}, 0],
        ["a", 0, LIFE, {}, 0, "", ""],
        ["a", 0, b"short", {}, 0, ""],
        ["a", -1, LIFE, {}, 0, ""],
        ["a", True, LIFE, {}, 0, ""],
        ["a b", 0, LIFE, {}, 0, ""],
        ["a", 0, LIFE, [], 0, ""],
        [b"a", 0, LIFE, {}, 0, ""],
    ],
)
def test_a_record_with_other_fields_is_refused(fields: Any) -> None:
    with pytest.raises(RefusedError, match="a record in the store of this group cannot be read"):
        Record.unpack(msgpack.packb(fields))


@given(st.binary() | st.recursive(st.none() | st.binary() | st.integers(-5, 5), st.lists).map(msgpack.packb))
def test_whatever_is_read_nothing_but_a_refusal_is_raised(raw: bytes) -> None:
    for read in (Record.unpack, unpack_roster):
        try:
            read(raw)
        except RefusedError:
            continue
        assert read is unpack_roster  # a list of bytes
