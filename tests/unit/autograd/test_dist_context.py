"""One autograd context on one worker: what the thread that reads messages needs of it never waits for tensors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zrpc.autograd.backward_pass import BackwardPass
from zrpc.autograd.dist_context import DistAutogradContext
from zrpc.errors import AutogradError
from zrpc.ids import GlobalId, WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.autograd.functions import SendFunction

PATIENCE_S = 30.0
PASS_ID = GlobalId(0, 1)


class Held:
    """Something that another thread does and that ends when the test says so."""

    def __init__(self) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> None:
        self.has_begun.set()
        assert self.may_end.wait(PATIENCE_S)


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.may_end.set()


@pytest.fixture
def pool(held: Held) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made
        held.may_end.set()


class SlowTensor(torch.Tensor):
    """A tensor that takes long to be added or copied."""

    hold: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("add", "copy_"):
            args[-1].hold()
        return super().__torch_function__(func, types, args, kwargs or {})


def slow_gradient(held: Held) -> torch.Tensor:
    made = torch.ones(2).as_subclass(SlowTensor)
    made.hold = held
    return made


def new_pass(context: DistAutogradContext) -> BackwardPass:
    peers: Any = SimpleNamespace(wake=lambda _: None)
    return BackwardPass(peers, context, PASS_ID, False, began_here=False)


@pytest.mark.parametrize("is_first", [True, False], ids=["cloned", "added"])
def test_a_pass_is_joined_and_ended_while_gradients_are_added(
    held: Held, pool: ThreadPoolExecutor, is_first: bool
) -> None:
    """A thread copies or adds a large gradient; the reader joins a pass, ends it, and releases the context."""
    context = DistAutogradContext(1)
    leaf = torch.zeros(2, requires_grad=True)
    if not is_first:
        context.add_gradients([(leaf, torch.ones(2))])
    gradient = slow_gradient(held)
    adding = pool.submit(context.add_gradients, [(leaf, gradient)])
    assert held.has_begun.wait(PATIENCE_S)

    def read() -> None:
        joined, _ = context.join_pass(PASS_ID, lambda: new_pass(context))
        assert context.active is joined
        context.add_known_worker(WorkerInfo("worker1", 1, b"a life."))
        context.end_pass(PASS_ID)
        context.release()
        with pytest.raises(AutogradError, match="released"):
            context.join_pass(GlobalId(0, 2), lambda: new_pass(context))

    pool.submit(read).result(PATIENCE_S)
    held.may_end.set()
    adding.result(PATIENCE_S)
    assert torch.equal(context.gradients()[leaf].as_subclass(torch.Tensor), torch.full((2,), 2.0 - is_first))


class SlowContext(DistAutogradContext):
    """A context whose graph takes long to be looked at."""

    hold: Callable[[], None]

    def sends(self) -> dict[GlobalId, SendFunction]:
        self.hold()
        return super().sends()


def test_further_gradients_are_taken_in_while_the_graph_is_looked_at(held: Held, pool: ThreadPoolExecutor) -> None:
    """The first gradients of a pass make a worker look at its whole graph; others are taken in meanwhile."""
    context = SlowContext(1)
    context.hold = held
    joined = new_pass(context)
    arrived: list[object] = []
    running = pool.submit(joined.run_arrived, lambda: arrived.append("gradients") or [])  # type: ignore[func-returns-value]
    assert held.has_begun.wait(PATIENCE_S)

    class Asked:
        rank = 1

        def reply(self, homeward: object) -> None:
            arrived.append("the end")

        def fail(self, error: BaseException) -> None:
            arrived.append(error)

    assert pool.submit(joined.answer_to, Asked()).result(PATIENCE_S)
    held.may_end.set()
    running.result(PATIENCE_S)
    assert arrived == ["gradients", "the end"]
