"""When a cluster ends, and with which exit code."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.cli.supervisor import BROKER, Phase, Report, RestartBroker, StartWorkers, Stop, Supervisor

WORKERS = ["worker 0", "worker 1"]


def running(has_broker: bool = True) -> Supervisor:
    supervisor = Supervisor(WORKERS, has_broker)
    actions = supervisor.begin()
    if has_broker:
        assert actions == []
        actions = supervisor.broker_listens()
    assert actions == [StartWorkers()]
    return supervisor


def test_all_workers_succeed_and_the_broker_is_stopped() -> None:
    supervisor = running()
    assert supervisor.exited("worker 1", 0) == []
    assert supervisor.exited("worker 0", 0) == [Stop.TERMINATE]
    assert supervisor.phase is Phase.STOPPING
    assert supervisor.exited(BROKER, 0) == []
    assert (supervisor.phase, supervisor.exit_code) == (Phase.OVER, 0)


def test_without_a_broker_the_last_success_is_the_end() -> None:
    supervisor = running(has_broker=False)
    supervisor.exited("worker 0", 0)
    assert supervisor.exited("worker 1", 0) == []
    assert (supervisor.phase, supervisor.exit_code) == (Phase.OVER, 0)


@pytest.mark.parametrize(("code", "shown"), [(3, 3), (-9, 137), (-15, 143)])
def test_the_first_failure_ends_the_cluster_with_its_code(code: int, shown: int) -> None:
    supervisor = running()
    assert supervisor.exited("worker 1", code) == [Report("worker 1", code), Stop.TERMINATE]
    assert supervisor.exited("worker 0", 1) == [], "fails because of the first"
    supervisor.exited(BROKER, 0)
    assert (supervisor.phase, supervisor.exit_code) == (Phase.OVER, shown)


@pytest.mark.parametrize(("code", "shown"), [(0, 1), (-9, 137)])
def test_a_broker_that_ends_by_itself_is_a_failure(code: int, shown: int) -> None:
    supervisor = running()
    assert supervisor.exited(BROKER, code) == [Report(BROKER, code), Stop.TERMINATE]
    assert supervisor.exit_code == shown


def test_a_broker_that_ends_while_workers_run_is_started_again_a_few_times() -> None:
    supervisor = Supervisor(WORKERS, True, 2)
    supervisor.begin()
    supervisor.broker_listens()
    assert supervisor.exited(BROKER, -9) == [RestartBroker(-9, 1)]
    assert supervisor.broker_listens() == [], "the workers run already"
    assert supervisor.exited(BROKER, 0) == [RestartBroker(0, 0)]
    assert supervisor.exited(BROKER, -9) == [Report(BROKER, -9), Stop.TERMINATE]
    assert supervisor.exit_code == 137


def test_a_broker_that_ends_while_the_cluster_does_is_not_started_again() -> None:
    supervisor = Supervisor(WORKERS, True, 2)
    supervisor.begin()
    supervisor.broker_listens()
    assert supervisor.interrupted(2) == [Stop.TERMINATE]
    assert supervisor.exited(BROKER, -2) == []


def test_a_broker_that_cannot_start_is_the_end() -> None:
    supervisor = Supervisor(WORKERS, has_broker=True)
    supervisor.begin()
    assert supervisor.exited(BROKER, 2) == [Report(BROKER, 2)]
    assert (supervisor.phase, supervisor.exit_code) == (Phase.OVER, 2)


def test_a_broker_that_does_not_come_up_is_ended() -> None:
    supervisor = Supervisor(WORKERS, has_broker=True)
    supervisor.begin()
    assert supervisor.failed_to_start() == [Stop.TERMINATE]
    assert supervisor.broker_listens() == []
    supervisor.exited(BROKER, -15)
    assert (supervisor.phase, supervisor.exit_code) == (Phase.OVER, 1)


def test_an_interrupt_terminates_and_a_second_kills() -> None:
    supervisor = running()
    assert supervisor.interrupted(2) == [Stop.TERMINATE]
    assert supervisor.interrupted(2) == [Stop.KILL]
    assert supervisor.interrupted(2) == []
    for name in (*WORKERS, BROKER):
        assert supervisor.exited(name, -9) == []
    assert (supervisor.phase, supervisor.exit_code) == (Phase.OVER, 130)


def test_whoever_does_not_end_in_time_is_killed() -> None:
    supervisor = running()
    supervisor.interrupted(15)
    assert supervisor.grace_over() == [Stop.KILL]
    assert supervisor.grace_over() == []


@given(st.lists(st.tuples(st.sampled_from([*WORKERS, BROKER]), st.integers(-15, 5)), max_size=8), st.booleans())
def test_it_is_over_exactly_when_nobody_is_left(exits: list[tuple[str, int]], interrupt: bool) -> None:
    supervisor = running()
    left = {*WORKERS, BROKER}
    codes: list[int] = []
    for name, code in exits:
        if name in left:
            left.remove(name)
            if supervisor.phase is Phase.RUNNING:  # how the broker ends after the last worker does not matter
                codes.append(code if name != BROKER else code or 1)
            supervisor.exited(name, code)
    if interrupt and supervisor.phase is Phase.RUNNING:
        supervisor.interrupted(2)
        codes.append(-2)
    assert (supervisor.phase is Phase.OVER) == (not left)
    first = next((code for code in codes if code), 0)
    if BROKER in left or any(codes) or not left:
        assert supervisor.exit_code == (128 - first if first < 0 else first)
