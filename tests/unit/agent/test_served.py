"""What code that serves a call may know of it, without processes."""

from __future__ import annotations

import time

from zrpc.agent.served import PRUNE_MIN_COUNT, ServedCall, is_cancelled, serving_of, time_remaining
from zrpc.errors import CallCancelledError, RpcTimeoutError

OVER_MS = 1


def over_call() -> ServedCall:
    """One whose time is over."""
    call = ServedCall(OVER_MS)
    while (call.left_s() or 0.0) > 0:
        time.sleep(OVER_MS / 1000)
    return call


def test_outside_of_a_served_call_nothing_is_cancelled_and_no_time_runs_out() -> None:
    assert not is_cancelled()
    assert time_remaining() is None


def test_a_call_is_served_within_a_context_and_not_after_it() -> None:
    outer, inner = ServedCall(50_000), ServedCall(0)
    with serving_of(outer):
        assert 0 < (time_remaining() or 0.0) <= 50
        with serving_of(inner):
            assert time_remaining() is None
            inner.cancel()
            assert is_cancelled()
        assert not is_cancelled()
    assert time_remaining() is None


def test_a_call_whose_time_is_over_counts_as_cancelled_once_code_was_told_so() -> None:
    """What the code then returns, early, is no result."""
    call = over_call()
    assert not call.is_cancelled
    with serving_of(call):
        assert is_cancelled()
        assert time_remaining() == 0
    assert call.is_cancelled
    assert isinstance(call.over(), RpcTimeoutError)


def test_a_nested_call_has_the_shorter_of_both_limits() -> None:
    without, limited = ServedCall(0), ServedCall(50_000)
    assert without.limit_s(0.0) == 0.0
    assert without.limit_s(3.0) == 3.0
    assert limited.limit_s(3.0) == 3.0
    assert 0 < limited.limit_s(0.0) <= 50
    assert 0 < limited.limit_s(99.0) <= 50
    assert 0 < over_call().limit_s(0.0) < 1, "0 would be no limit"


def test_cancel_tells_each_listener_once_whenever_it_registers() -> None:
    call = ServedCall(0)
    told: list[str] = []
    call.when_cancelled(lambda: told.append("before"))
    assert call.over() is None
    call.cancel()
    call.when_cancelled(lambda: told.append("after"))
    call.cancel()
    assert told == ["before", "after"]
    assert isinstance(call.over(), CallCancelledError)


def test_nested_calls_that_have_ended_are_forgotten() -> None:
    """A function that calls for hours keeps no note of each call."""
    call, live = ServedCall(0), {7, 5_000}
    for number in range(10_000):
        call.add_nested(number, lambda one: one in live)
    nested = call.cancel()
    assert live <= set(nested)
    assert len(nested) <= PRUNE_MIN_COUNT + 2


def test_a_limit_that_is_over_reads_as_it_does_at_the_caller() -> None:
    """torch's programs look for these words, and the answer may be there before the caller's own limit ends."""
    assert str(over_call().over()).startswith("RPC ran for more than its time limit")
