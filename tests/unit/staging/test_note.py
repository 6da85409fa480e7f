"""Notes: what one side writes the other reads, and nothing else is taken for a note."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from zrpc.errors import ProtocolError
from zrpc.staging.note import NOTE_NBYTES, Answer, answer, answer_in, read_ticket, reason_in, write_ticket

TICKET = [0, b"\x01" * 64, 1 << 29, 512, b"/torch_1_2", 77, b"\x02" * 64, True]


def fresh() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.zeros(NOTE_NBYTES, np.uint8)


def test_a_ticket_is_read_as_it_was_written_whatever_is_answered() -> None:
    view = fresh()
    write_ticket(view, TICKET)
    assert answer_in(view) is Answer.NONE
    assert read_ticket(view.data) == TICKET
    answer(view.data, Answer.REFUSED, "no peer access: " + "ä" * 500)
    assert answer_in(view) is Answer.REFUSED
    assert reason_in(view).startswith("no peer access: ääää")
    answer(view.data, Answer.OPENED)
    assert answer_in(view) is Answer.OPENED
    assert read_ticket(view.data) == TICKET


def test_a_ticket_that_is_too_long_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs to open the memory takes 5003 bytes"):
        write_ticket(fresh(), [b"x" * 4999])


def ticket_or_refusal(buffer: memoryview) -> bool:
    try:
        return isinstance(read_ticket(buffer), list)
    except ProtocolError:
        return True


@given(st.binary(max_size=600))
def test_what_is_no_note_is_refused(content: bytes) -> None:
    assert ticket_or_refusal(memoryview(bytearray(content))), "and raises nothing else"


@pytest.mark.parametrize("content", [b"", bytes(NOTE_NBYTES), b"\xff" * NOTE_NBYTES])
def test_empty_notes_are_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="a note of device memory"):
        read_ticket(bytearray(content))


def test_a_note_that_cannot_be_answered_is_refused() -> None:
    view = fresh()
    write_ticket(view, TICKET)
    with pytest.raises(ProtocolError, match="cannot be answered"):
        read_ticket(view.tobytes())
