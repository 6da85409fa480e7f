"""Who is taken for lost, and when everybody is probed."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from zrpc_broker.liveness import PROBE_DELAYS_S, Liveness, Standing

A, B = b"A" * 8, b"B" * 8


def liveness() -> Liveness:
    return Liveness(interval_s=1.0, missed_max=3, now=0.0)


def run(watch: Liveness, start: float, end: float, step: float = 0.5) -> list[tuple[float, bytes]]:
    """Tick from `start` to `end`; who was lost when."""
    lost = []
    now = start
    while now <= end:
        lost += [(now, member) for member in watch.tick(now)[0]]
        now += step
    return lost


def test_a_silent_worker_is_lost_once_and_a_talking_one_is_not() -> None:
    watch = liveness()
    watch.heard(A, 0.0)
    lost = []
    for tenth in range(100):
        now = tenth / 10
        watch.heard(B, now)
        lost += [(now, member) for member in watch.tick(now)[0]]
    assert [member for _, member in lost] == [A]
    assert 3.0 < lost[0][0] < 3.2
    assert watch.members() == [B]


def test_a_forgotten_worker_is_not_lost() -> None:
    watch = liveness()
    watch.heard(A, 0.0)
    watch.forget(A)
    watch.forget(B)
    assert run(watch, 0.0, 10.0) == []


def test_time_in_which_the_broker_did_not_run_is_not_counted() -> None:
    watch = liveness()
    watch.heard(A, 0.0)
    assert run(watch, 0.0, 1.0) == []
    assert watch.tick(1000.0) == ([], False)
    assert run(watch, 1000.5, 1001.5) == []
    assert [member for _, member in run(watch, 1002.0, 1004.0)] == [A]


def test_a_hint_makes_several_probes_and_then_none() -> None:
    watch = liveness()
    assert not watch.tick(9.9)[1]
    watch.hint(10.0)
    assert [watch.tick(10.0 + delay)[1] for delay in PROBE_DELAYS_S] == [True] * len(PROBE_DELAYS_S)
    assert not watch.tick(20.0)[1]


def test_it_says_how_long_nothing_is_due() -> None:
    watch = liveness()
    assert watch.wait_s(0.0) == 0.125
    watch.hint(0.0)
    assert watch.wait_s(0.0) == 0.0
    watch.tick(0.0)
    assert watch.wait_s(0.0) == PROBE_DELAYS_S[1]


@given(st.lists(st.floats(0.0, 0.99), min_size=1, max_size=60))
def test_a_worker_that_keeps_its_interval_is_never_lost(gaps: list[float]) -> None:
    watch = liveness()
    now = 0.0
    watch.heard(A, now)
    for gap in gaps:
        now += gap
        assert watch.tick(now) == ([], False)
        watch.heard(A, now)


def acknowledges(member: bytes, for_s: float) -> bool:
    return False


def is_gone(member: bytes, for_s: float) -> bool:
    return True


def test_a_silent_worker_is_asked_and_lost_where_its_host_does_not_acknowledge() -> None:
    watch = liveness()
    watch.heard(A, 0.0)
    assert watch.look(1.2, is_gone) == []
    assert watch.look(1.3, is_gone) == [(A, Standing.ASKED)]
    assert watch.look(1.9, is_gone) == [], "it was not asked long ago"
    assert watch.look(2.0, is_gone) == [(A, Standing.GONE)]
    assert watch.members() == []
    assert watch.look(3.0, is_gone) == []


def test_a_silent_worker_whose_host_acknowledges_is_suspected_and_comes_back() -> None:
    watch = liveness()
    watch.heard(A, 0.0)
    assert [watch.look(now, acknowledges) for now in (1.5, 2.0, 2.5)] == [
        [(A, Standing.ASKED)], [(A, Standing.SUSPECTED)], [],
    ]  # fmt: skip
    watch.heard(A, 2.6)
    assert watch.look(2.7, acknowledges) == [(A, Standing.HEARD)]
    assert watch.look(2.8, acknowledges) == []
    assert watch.members() == [A]


def test_one_that_is_suspected_is_lost_when_its_host_vanishes_then() -> None:
    watch = liveness()
    watch.heard(A, 0.0)
    watch.look(1.5, acknowledges)
    watch.look(2.0, acknowledges)
    assert watch.look(2.5, is_gone) == [(A, Standing.GONE)]


def test_nobody_is_taken_for_gone_that_was_not_asked() -> None:
    """A broker that was busy for long asks first."""
    watch = liveness()
    watch.heard(A, 0.0)
    assert watch.look(10.0, is_gone) == [(A, Standing.ASKED)]
