"""Property tests: no history of lost, repeated, reordered and late messages and dying workers leaks or deletes early.

`ZRPC_HISTORIES=10000` runs that many random histories instead of the default number.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.rref.simulation import World

HISTORIES = int(os.environ.get("ZRPC_HISTORIES", "1000"))
SIZE = 3

rank = st.integers(0, SIZE - 1)
choice = st.integers(0, 63)

PROGRAM = [
    st.tuples(st.just("make_local"), rank),
    st.tuples(st.just("make_remote"), rank, rank),
    st.tuples(st.just("share"), choice, rank),
    st.tuples(st.just("share"), choice, rank),
    st.tuples(st.just("drop"), choice),
    st.tuples(st.just("drop"), choice),
    st.tuples(st.just("fetch"), choice),
]
UNANNOUNCED = [st.tuples(st.just("share_unannounced"), choice, rank)]
NETWORK = [
    st.tuples(st.just("deliver"), choice),
    st.tuples(st.just("deliver"), choice),
    st.tuples(st.just("repeat"), choice),
    st.tuples(st.just("repeat_late"), choice),
    st.tuples(st.just("delay"), choice),
    st.tuples(st.just("arrive_late"), choice),
    st.tuples(st.just("calm")),
]
LOSSES = [
    st.tuples(st.just("lose"), choice),
    st.tuples(st.just("retry"), rank),
    st.tuples(st.just("give_up_creating"), choice),
    st.tuples(st.just("give_up_call"), choice),
    st.tuples(st.just("give_up_call"), choice),
]
DEATHS = [
    st.tuples(st.just("die"), rank),
    st.tuples(st.just("tell_deaths"), rank),
    st.tuples(st.just("tell_deaths"), rank),
]

RETURNS = [st.tuples(st.just("come_again"), choice)]

thorough = settings(max_examples=HISTORIES, deadline=None, suppress_health_check=list(HealthCheck))


def run(history: list[tuple[object, ...]], max_deaths: int = 0) -> World:
    world = World(SIZE)
    for event, *args in history:
        if event == "die" and len(world.dead) >= max_deaths:
            continue
        getattr(world, str(event))(*args)
        world.check()
    world.settle()
    world.check_empty()
    return world


@thorough
@given(st.lists(st.one_of(*PROGRAM, *UNANNOUNCED, *NETWORK), max_size=100))
def test_reordered_and_repeated_messages(history: list[tuple[object, ...]]) -> None:
    run(history)


@thorough
@given(st.lists(st.one_of(*PROGRAM, *UNANNOUNCED, *NETWORK, *LOSSES), max_size=100))
def test_lost_and_late_messages(history: list[tuple[object, ...]]) -> None:
    run(history)


@thorough
@given(st.lists(st.one_of(*PROGRAM, *NETWORK, *LOSSES, *DEATHS), max_size=100))
def test_dying_workers(history: list[tuple[object, ...]]) -> None:
    run(history, max_deaths=1)


@thorough
@given(st.lists(st.one_of(*PROGRAM, *NETWORK, *LOSSES, *DEATHS, *RETURNS, *RETURNS), max_size=100))
def test_workers_that_die_and_come_again_under_their_ranks(history: list[tuple[object, ...]]) -> None:
    """No message or loss of one life is taken for another's, though both give out ids of one rank and counter."""
    run(history, max_deaths=3)
