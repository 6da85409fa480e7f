"""A reader serves what is quick, and tries again now and then what was not."""

from __future__ import annotations

import pytest

from zrpc.agent.quickness import QUICK_S, SKIP_MAX, SKIP_MIN, Quickness

SLOW_S = 2 * QUICK_S


def skipped(quickness: Quickness) -> int:
    """How many requests go to handler threads before one is tried."""
    for number in range(2 * SKIP_MAX):
        if quickness.expects_quick():
            return number
    raise AssertionError("it never tries again")


def test_at_first_and_as_long_as_it_is_quick_the_reader_serves() -> None:
    quickness = Quickness()
    for _ in range(100):
        assert quickness.expects_quick()
        quickness.note(QUICK_S)


def test_each_slow_one_doubles_the_pause_up_to_a_limit_and_a_quick_one_ends_it() -> None:
    quickness = Quickness()
    pauses = []
    for _ in range(8):
        quickness.note(SLOW_S)
        pauses.append(skipped(quickness))
    assert pauses == [min(SKIP_MIN << turn, SKIP_MAX) for turn in range(8)]
    quickness.note(0.0)
    assert skipped(quickness) == 0
    quickness.note(SLOW_S)
    assert skipped(quickness) == SKIP_MIN


def test_work_that_fails_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.0 + SLOW_S])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    quickness = Quickness()
    with pytest.raises(ZeroDivisionError):
        quickness.timed(lambda: print(1 // 0))
    assert not quickness.expects_quick()
