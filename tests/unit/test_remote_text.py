"""Text of other processes is shown without anything that a terminal acts on, and not without end."""

from __future__ import annotations

import pytest

from zrpc import remote_text
from zrpc.ids import GlobalId
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import AbortBackward, Failure, Left, Refused


@pytest.mark.parametrize("text", ["", "plain", "größer ±", "quotes ' and \" and \\"])
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert remote_text.line(text) == text
    assert remote_text.lines(f"{text}\n\t{text}\n") == f"{text}\n\t{text}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("bell\x07", r"bell\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("over\rwritten", r"over\rwritten"),
        ("reversed\u202e", r"reversed\u202e"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_a_terminal_acts_on_is_escaped(text: str, shown: str) -> None:
    """Escape sequences, carriage returns, marks that turn the direction of text, and what cannot be encoded."""
    assert remote_text.line(text) == shown
    assert remote_text.lines(f"{text}\n") == f"{shown}\n"


def test_a_line_has_no_line_ends() -> None:
    assert remote_text.line("one\ntwo\tthree") == r"one\ntwo\tthree"


def test_text_is_cut_and_says_so() -> None:
    assert remote_text.line("x" * 600) == "x" * 500 + "... (100 more characters)"
    assert len(remote_text.lines("x" * 1_000_000)) < 200_100


@pytest.mark.parametrize(
    "message",
    [Left(b"A" * 8, True, "\x1b[2J\n"), Refused("\x1b[2J\n"), AbortBackward(1, GlobalId(1, 2, b"A" * 8), "\x1b[2J\n")],
)
def test_reasons_arrive_as_clean_lines(message: Left | Refused | AbortBackward) -> None:
    arrived = decode([bytes(frame) for frame in encode(Envelope(message))]).message
    assert isinstance(arrived, type(message))
    assert arrived.reason == r"\x1b[2J\n"


def test_remote_tracebacks_keep_their_lines_and_lose_escape_sequences() -> None:
    failure = Failure("Error\n", "a\nb\x1b", "line 1\n  line 2\x07\n")
    arrived = decode([bytes(frame) for frame in encode(Envelope(failure))]).message
    assert arrived == Failure(r"Error\n", "a\nb\\x1b", "line 1\n  line 2\\x07\n")
