"""Steps have their turns one after the other, on one worker."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest

from zrpc.agent.hooks import Hooks
from zrpc.agent.pool import blocking
from zrpc.errors import AutogradError
from zrpc.optim.turns import MAX_DEPTH, StepHook, Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.agent.agent import Agent

PATIENCE_S = 30.0


class Worker:
    """As much of an agent as turns need."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.hooks = Hooks({StepHook.key: StepHook()})
        self._pool = pool

    def submit(self, task: Callable[[], None]) -> None:
        self._pool.submit(task)


class Held:
    """A step that lasts until the test says so."""

    def __init__(self, order: list[str]) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self._order = order

    def __call__(self) -> None:
        self._order.append("held")
        self.has_begun.set()
        assert self.may_end.wait(PATIENCE_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


@pytest.fixture
def agent(pool: ThreadPoolExecutor) -> Agent:
    return cast("Agent", Worker(pool))


def test_steps_that_wait_run_in_the_order_in_which_they_came(agent: Agent, pool: ThreadPoolExecutor) -> None:
    """Several steps come while one runs: no thread waits for them, and they follow in order."""
    turns, order = Turns(), list[str]()
    held = Held(order)
    first = pool.submit(turns.submit, held, agent)
    assert held.has_begun.wait(PATIENCE_S)
    futures = [turns.submit(lambda name=name: order.append(name), agent) for name in "abc"]  # type: ignore[misc]
    assert not any(future.done() for future in futures)
    held.may_end.set()
    for future in futures:
        future.wait()
    first.result(PATIENCE_S)
    assert order == ["held", "a", "b", "c"]


@pytest.mark.parametrize("error", [ValueError("on purpose"), SystemExit(3)])
def test_a_step_that_fails_tells_its_caller_and_lets_the_next_one_run(
    agent: Agent, pool: ThreadPoolExecutor, error: BaseException
) -> None:
    """A step that waited raises: its future has the error, and the turn is the next one's."""
    turns, order = Turns(), list[str]()
    held = Held(order)
    first = pool.submit(turns.submit, held, agent)
    assert held.has_begun.wait(PATIENCE_S)

    def fail() -> None:
        raise error

    failing, after = turns.submit(fail, agent), turns.submit(lambda: order.append("after"), agent)
    held.may_end.set()
    with pytest.raises(ValueError if isinstance(error, Exception) else RuntimeError, match=r"on purpose|SystemExit"):
        failing.wait()
    after.wait()
    first.result(PATIENCE_S)
    assert order == ["held", "after"]


def test_a_step_within_a_step_on_one_thread_runs_at_once() -> None:
    """A hook steps another local optimizer on its own thread."""
    turns, order = Turns(), list[str]()
    turns.run(lambda: (order.append("outer"), turns.run(lambda: order.append("inner"))))  # type: ignore[arg-type,func-returns-value,return-value]
    assert order == ["outer", "inner"]


def test_steps_within_each_other_without_end_are_stopped() -> None:
    """The error says why; the turn is free after it."""
    turns, depth = Turns(), list[int]()

    def again() -> None:
        depth.append(1)
        turns.run(again)

    with pytest.raises(AutogradError, match=f"{MAX_DEPTH} optimizer steps run within each other"):
        turns.run(again)
    assert len(depth) == MAX_DEPTH
    turns.run(lambda: depth.clear())
    assert not depth


def test_a_step_of_others_does_not_run_while_one_waits_for_a_call(agent: Agent, pool: ThreadPoolExecutor) -> None:
    """A step waits for a remote call of its own: only steps that it was called from may run meanwhile."""
    turns, order = Turns(), list[str]()
    waits, answered = threading.Event(), threading.Event()

    def step() -> None:
        with blocking():
            waits.set()
            assert answered.wait(PATIENCE_S)
        order.append("waited")

    waiting = pool.submit(turns.submit, step, agent)
    assert waits.wait(PATIENCE_S)
    other = turns.submit(lambda: order.append("other"), agent)
    assert not other.done()
    answered.set()
    other.wait()
    waiting.result(PATIENCE_S)
    assert order == ["waited", "other"]


def test_a_step_goes_on_only_when_the_one_that_it_called_for_is_over(agent: Agent, pool: ThreadPoolExecutor) -> None:
    """What a step calls for comes back to its worker, and its answer comes first: the step waits all the same."""
    turns, order = Turns(), list[str]()
    held = Held(order)

    def step() -> None:
        chain: Any = agent.hooks[StepHook.key].send(None, None, None, None)  # type: ignore[arg-type]

        def serve() -> None:
            with agent.hooks[StepHook.key].receive(None, chain, None, False):  # type: ignore[arg-type]
                turns.submit(held, agent)

        with blocking():
            with blocking():  # waits lie within each other
                pass
            pool.submit(serve)
            assert held.has_begun.wait(PATIENCE_S)
            pool.submit(lambda: (order.append("lets go"), held.may_end.set()))
        order.append("goes on")

    turns.submit(step, agent)
    assert order == ["held", "lets go", "goes on"]
