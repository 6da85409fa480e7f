"""docs/wire.md lists every message as it is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from zrpc.wire import observing, rejoining, unanswered
from zrpc.wire.messages import MESSAGES, PROTOCOL_VERSION

PAGE = Path(__file__).resolve().parents[3] / "docs" / "wire.md"
ROW = re.compile(r"^\| (\d+) \| (\w+) \| ([^|]*)\|[^|]*\|[^|]*\| (yes|no) \|", re.MULTILINE)


def test_every_message_is_listed_with_its_fields_in_order() -> None:
    text = PAGE.read_text()
    assert {rejoining.Rejoin.CODE, unanswered.CallsUnanswered.CODE, observing.Look.CODE} <= MESSAGES.keys()
    listed = {}
    for code, name, cell, idempotent in ROW.findall(text):
        names = [name for group in cell.split(";") for name in group.split(":")[0].replace(",", " ").split()]
        listed[int(code)] = (name, names, idempotent == "yes")
    assert listed == {
        code: (cls.__name__, [field.name for field in dataclasses.fields(cls)], cls.IDEMPOTENT)  # type: ignore[arg-type]
        for code, cls in MESSAGES.items()
    }
    assert f"Version {PROTOCOL_VERSION} (`PROTOCOL_VERSION`)" in text
