"""What came and could not be read is counted each time, and logged now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.errors import ProtocolError
from zrpc.protocol_errors import BURST, INTERVAL_S, Tally

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


def at_once(task: Callable[[], object]) -> None:
    task()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_is_counted_by_its_kind() -> None:
    tally = Tally(defer=at_once)
    for _ in range(50):
        tally.note("message", "a", ProtocolError("damaged"))
    tally.note("packet", "b", "damaged")
    assert tally.counts() == {"message": 50, "packet": 1}


def test_the_first_are_logged_and_then_one_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    """A flood fills no log; how many lines were left out is said."""
    clock = Clock()
    tally = Tally(clock, at_once)
    for _ in range(1000):
        tally.note("message", "a", ProtocolError("damaged"))
    assert len(caplog.messages) == BURST
    tally.note("packet", "a", ProtocolError("another kind"))
    assert len(caplog.messages) == BURST + 1
    clock.now += INTERVAL_S
    for _ in range(10):
        tally.note("message", "a", ProtocolError("damaged"))
    assert len(caplog.messages) == BURST + 2
    assert f"damaged (and {1000 - BURST} more of this kind since the last line)" in caplog.messages[-1]


def test_what_is_logged_is_one_clean_line(caplog: pytest.LogCaptureFixture) -> None:
    Tally(defer=at_once).note("message", "name\x1b[1m", ProtocolError("a\nb" + "x" * 10_000))
    (text,) = caplog.messages
    assert text.isprintable()
    assert len(text) < 1000


def test_nothing_is_logged_by_the_thread_that_notes_unless_it_may(caplog: pytest.LogCaptureFixture) -> None:
    later: list[Callable[[], object]] = []
    tally = Tally(defer=later.append)
    tally.note("message", "a", "damaged")
    assert not caplog.messages
    assert len(later) == 1
    tally.note("message", "a", "damaged", at_once=True)
    assert len(caplog.messages) == 1
