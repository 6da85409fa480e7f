"""Random programs over several workers give the gradients that one process gives, to the bit.

Every tensor lives on the worker that computed it; a step that needs tensors of others fetches them from there. So
graphs come about with diamonds, ping-pong, chains of workers and leaves that are shared, in all combinations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.autograd.cluster import Cluster, Worker
from tests.unit.autograd.programs import Program, Step, begin, programs, same
from zrpc.autograd.leaves import _taps

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

N_WORKERS = 3


@dataclass(frozen=True)
class Placed:
    """A program, on which worker each leaf and each step is, and how it is differentiated."""

    program: Program
    leaves_on: tuple[int, ...]
    steps_on: tuple[int, ...]
    unused: frozenset[int]
    passes: int
    seed: int


@st.composite
def placed_programs(draw: DrawFn, may_be_unused: bool) -> Placed:
    """Random programs on random workers; in `unused` are results that do not count, if there may be such."""
    program = draw(programs(max_steps=8))
    worker = st.integers(0, N_WORKERS - 1)
    n = len(program.steps)
    return Placed(
        program,
        tuple(draw(st.lists(worker, min_size=program.n_leaves, max_size=program.n_leaves))),
        tuple(draw(st.lists(worker, min_size=n, max_size=n))),
        draw(st.frozensets(st.integers(0, 20), max_size=5)) if may_be_unused else frozenset(),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 1000)),
    )


class Stores:
    """The tensors of each worker, by number, and who has which."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.tensors: dict[int, torch.Tensor] = {}
        self.owners: list[int] = []
        self.used: set[int] = set()

    def put(self, owner: int, tensor: torch.Tensor) -> None:
        """Tensor number `len(owners)` is `owner`'s."""
        self.tensors[len(self.owners)] = tensor
        self.owners.append(owner)

    def get(self, worker: Worker, number: int) -> torch.Tensor:
        """A tensor for `worker`: its own, or a copy fetched from the owner."""
        self.used.add(number)
        owner = self.workers[self.owners[number]]
        if owner is worker:
            return self.tensors[number]
        fetched: torch.Tensor = worker.call(owner, lambda _: self.tensors[number])
        return fetched

    def run(self, worker: Worker, step: Step) -> None:
        """Compute on `worker`."""
        for output in step.compute([self.get(worker, number) for number in step.operands(len(self.owners))]):
            self.put(worker.rank, output)


def counted(n: int, used: set[int], unused: frozenset[int]) -> list[int]:
    """The tensors that count: those that nothing was made of, and that are not declared unused; at least one."""
    found = [number for number in range(n) if number not in used and number not in unused]
    return found or [n - 1]


def expected(placed: Placed) -> list[torch.Tensor | None]:
    """What one process makes of it."""
    trace = begin(placed.program)
    used: set[int] = set()
    for step in placed.program.steps:
        used.update(step.operands(len(trace.tensors)))
        trace.run(step)
    roots = [trace.tensors[number].sum() * 2 for number in counted(len(trace.tensors), used, placed.unused)]
    gradients = torch.autograd.grad(roots, trace.leaves, allow_unused=True)
    return list(gradients)


def run(workers: list[Worker], placed: Placed, smart: bool) -> list[torch.Tensor | None]:
    """The gradients of the leaves by distributed autograd, after one pass of `placed.passes` (the others repeat it)."""
    workers[0].cluster.network.random.seed(placed.seed)
    stores, leaves = Stores(workers), begin(placed.program).leaves
    for leaf, owner in zip(leaves, placed.leaves_on, strict=True):
        stores.put(owner, leaf)
    with workers[0].context() as context_id:
        for step, rank in zip(placed.program.steps, placed.steps_on, strict=True):
            if rank == 0:
                stores.run(workers[0], step)
            else:
                workers[0].call(workers[rank], stores.run, step)
        n = len(stores.owners)
        roots = [stores.get(workers[0], number).sum() * 2 for number in counted(n, set(stores.used), placed.unused)]
        for number in range(placed.passes):
            workers[0].backward(context_id, *roots, retain_graph=number + 1 < placed.passes, smart=smart)
        gradients: list[torch.Tensor | None] = []
        for leaf, owner in zip(leaves, placed.leaves_on, strict=True):
            context = workers[owner].service.contexts.find(context_id)
            gradients.append(None if context is None else context.gradients().get(leaf))
        assert all(worker.service.debug_info()["num_current_backward_passes"] == 0 for worker in workers)
    assert not _taps
    return gradients


def check(cluster: Cluster, placed: Placed, smart: bool) -> None:
    """Compare."""
    single = expected(placed)
    gradients = run(cluster.workers, placed, smart)
    whole = [None if gradient is None else gradient * placed.passes for gradient in single]
    assert all(same(mine, its) for mine, its in zip(gradients, whole, strict=True)), (gradients, whole)


def check_all(smart: bool, threads: int, max_examples: int) -> None:
    """Compare for many programs on one cluster."""
    cluster = Cluster(N_WORKERS, threads=threads)

    @settings(max_examples=max_examples, deadline=None)
    @given(placed=placed_programs(may_be_unused=smart))
    def with_cluster(placed: Placed) -> None:
        check(cluster, placed, smart)

    try:
        with_cluster()
    finally:
        cluster.close()


def test_fast() -> None:
    check_all(smart=False, threads=3, max_examples=150)


def test_fast_with_one_handler_thread() -> None:
    check_all(smart=False, threads=1, max_examples=60)


def test_smart() -> None:
    check_all(smart=True, threads=2, max_examples=150)


def test_a_hooked_cut_that_leads_to_a_leaf_of_its_segment() -> None:
    """What torch's engine computes of the cut is without its hook, and must not get to the leaf by way of another."""
    plain = Step("add", 0, 0, None)
    steps = (plain, plain, Step("add", 0, 12, "post"), plain, plain, Step("add", 2, 5, None))
    placed = Placed(Program(3, frozenset({0}), steps), (1, 0, 1), (0, 0, 1, 0, 0, 1), frozenset(), passes=1, seed=0)
    cluster = Cluster(N_WORKERS, threads=3)
    try:
        check(cluster, placed, smart=False)
    finally:
        cluster.close()
