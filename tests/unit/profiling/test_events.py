"""Events on their way from callee to caller."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zrpc.profiling.events import Event, from_torch, shift_into, to_torch

SPANS = st.tuples(st.floats(0, 1e9), st.floats(0, 1e6)).map(lambda span: (span[0], span[0] + span[1]))


def test_an_event_survives_torchs_own_class() -> None:
    event = Event("aten::add", 1500.0, 1700.0, 3, 2, 9, 1, ([2, 3], []), ("here",), 1, 64, 0, 5, 7, True, True)
    again = from_torch(to_torch(event, 1000.0), 1000.0)
    assert again._replace(shapes=tuple(again.shapes), stack=tuple(again.stack)) == event


def test_the_caller_shows_it_as_a_part_of_its_call() -> None:
    event = Event("aten::add", 10.0, 20.0, node_id=2).called_by("rpc_sync#f(a -> b)", 5.0)
    assert event.name == "rpc_sync#f(a -> b)#remote_op: aten::add"
    assert (event.start_us, event.end_us, event.node_id, event.is_remote) == (15.0, 25.0, 2, True)


@given(st.lists(SPANS, min_size=1), SPANS)
def test_events_of_another_clock_are_put_in_the_middle_of_the_call(
    spans: list[tuple[float, float]], call: tuple[float, float]
) -> None:
    events = [Event("op", start, end) for start, end in spans]
    shift_us = shift_into(events, *call)
    first, last = min(start for start, _ in spans) + shift_us, max(end for _, end in spans) + shift_us
    if shift_us == 0.0:
        assert (call[0] <= first and last <= call[1]) or abs((first + last) - sum(call)) < 1e-3
    else:
        assert abs((first + last) - sum(call)) < 1e-3


def test_nothing_needs_no_shift() -> None:
    assert shift_into([], 1.0, 2.0) == 0.0
