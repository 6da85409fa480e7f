"""Passes over several workers: what they leave, how they end, what errors and losses do."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd import Function

from tests.unit.autograd.cluster import Cluster, Worker
from tests.waiting import until
from zrpc.autograd.container import ContextContainer
from zrpc.autograd.dist_context import DistAutogradContext
from zrpc.autograd.functions import RecvInfo
from zrpc.autograd.leaves import _taps
from zrpc.errors import AgentClosedError, AutogradError, PeerLostError
from zrpc.ids import GlobalId, WorkerInfo
from zrpc.wire.messages import BuiltinCall, PythonCall
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(3, threads=1)
    yield made
    made.close()
    assert not _taps


def idle(cluster: Cluster) -> bool:
    return all(worker.service.debug_info()["num_current_backward_passes"] == 0 for worker in cluster.workers)


def multiply(worker: Worker, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b


class Raise(Function):
    """Raises in backward, as long as `raises` is set."""

    raises = True

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if Raise.raises:
            raise ValueError("raised on purpose")
        return gradient


def raising(worker: Worker, a: torch.Tensor) -> torch.Tensor:
    raised: torch.Tensor = Raise.apply(a)  # type: ignore[no-untyped-call]
    return raised


def ones() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


# ---- gradients -------------------------------------------------------------------------------------------------


def test_there_and_back(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a, b = torch.arange(3.0, requires_grad=True), ones()
    with here.context() as context_id:
        here.backward(context_id, here.call(there, multiply, a, b).sum())
        gradients = here.gradients(context_id)
        assert torch.equal(gradients[a], b)
        assert torch.equal(gradients[b], a)
    assert a.grad is None


def test_a_call_to_oneself(cluster: Cluster) -> None:
    here = cluster.workers[0]
    a = ones()
    with here.context() as context_id:
        here.backward(context_id, here.call(here, multiply, a, a * 2).sum())
        assert torch.equal(here.gradients(context_id)[a], torch.full((3,), 4.0))


def test_gradients_of_several_passes_add_up(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    with here.context() as context_id:
        loss = here.call(there, multiply, a, torch.ones(3)).sum()
        for _ in range(3):
            here.backward(context_id, loss, retain_graph=True)
        here.backward(context_id, loss)
        assert torch.equal(here.gradients(context_id)[a], torch.full((3,), 4.0))


def test_leaves_elsewhere_have_their_gradients_there(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    weight = ones()
    with here.context() as context_id:
        loss = here.call(there, lambda worker, x: x * weight, torch.arange(3.0)).sum()
        here.backward(context_id, loss)
        assert not here.gradients(context_id)
        assert torch.equal(there.gradients(context_id)[weight], torch.arange(3.0))


def test_sparse_gradients_travel(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    table = torch.ones(10, 2, requires_grad=True)
    index = torch.tensor([1, 3, 3])
    with here.context() as context_id:
        doubled = here.call(there, lambda worker, x: x * 1, table.to_sparse())
        here.backward(context_id, torch.sparse.sum(doubled))
        assert torch.equal(here.gradients(context_id)[table].to_dense(), torch.ones(10, 2))
    with here.context() as context_id:
        rows = torch.nn.functional.embedding(index, table, sparse=True)
        here.backward(context_id, here.call(there, multiply, rows, rows).sum())
        assert torch.equal(here.gradients(context_id)[table].to_dense()[3], torch.full((2,), 4.0))


def test_what_needs_no_gradient_gets_none(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a, b = ones(), torch.ones(3)
    with here.context() as context_id:
        here.backward(context_id, here.call(there, multiply, a, b).sum())
        assert list(here.gradients(context_id)) == [a]


def test_many_contexts_on_one_worker_at_once() -> None:
    cluster = Cluster(4, threads=3)
    weight = torch.full((3,), 2.0, requires_grad=True)
    failures: list[BaseException] = []

    def train(worker: Worker, scale: float) -> None:
        try:
            for _ in range(5):
                with worker.context() as context_id:
                    x = torch.full((3,), scale, requires_grad=True)
                    y = worker.call(cluster.workers[0], lambda _, x: x * weight, x)
                    z = worker.call(cluster.workers[0], lambda _, x, y: x * y * weight, x, y)
                    worker.backward(context_id, z.sum())
                    assert torch.equal(worker.gradients(context_id)[x], torch.full((3,), 8 * scale))
                    there = cluster.workers[0].gradients(context_id)
                    assert torch.equal(there[weight], torch.full((3,), 4 * scale * scale))
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=train, args=(worker, float(scale)))
        for worker in cluster.workers[1:]
        for scale in range(1, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.close()
    assert not failures


# ---- SMART and FAST --------------------------------------------------------------------------------------------


def test_smart_does_not_wait_for_what_takes_no_part(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    with here.context() as context_id:
        here.call(there, multiply, a, a)
        here.backward(context_id, (a * 3).sum(), smart=True)
        assert torch.equal(here.gradients(context_id)[a], torch.full((3,), 3.0))


def test_fast_waits_for_it_until_the_context_ends(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    errors: list[BaseException] = []

    def run(context_id: int) -> None:
        try:
            here.backward(context_id, (a * 3).sum())
        except AutogradError as error:
            errors.append(error)

    with here.context() as context_id:
        here.call(there, multiply, a, a)
        thread = threading.Thread(target=run, args=(context_id,))
        thread.start()
        until(lambda: here.service.debug_info()["num_current_backward_passes"] == 1, "the pass has begun")
        thread.join(0.1)
        assert thread.is_alive()
    thread.join()
    assert "released" in str(errors[0])


# ---- contexts --------------------------------------------------------------------------------------------------


def test_a_context_ends_everywhere(cluster: Cluster) -> None:
    first, second, third = cluster.workers

    def pass_on(worker: Worker) -> None:
        worker.call(third, lambda _: None)

    with first.context() as context_id:
        first.call(second, pass_on)
        assert all(worker.service.contexts.find(context_id) for worker in cluster.workers)
        assert first.service.contexts.get(context_id)._known_worker_ids() == {1}
    with pytest.raises(AutogradError, match=f"Could not find autograd context with id: {context_id}"):
        first.service.contexts.get(context_id)
    until(
        lambda: all(worker.service.debug_info()["num_autograd_contexts"] == 0 for worker in cluster.workers),
        "the contexts are released",
    )


def test_a_context_ends_where_a_worker_told_of_it_that_is_gone(cluster: Cluster) -> None:
    first, second, third = cluster.workers
    with first.context() as context_id:
        first.call(second, lambda worker: worker.call(third, lambda _: None))
        cluster.kill(second)
        until(
            lambda: first.service.contexts.get(context_id)._known_worker_ids() == {1, 2},
            "the creator knows who else has the context",
        )
        assert third.service.contexts.find(context_id) is not None
    until(lambda: third.service.contexts.find(context_id) is None, "the context is released")


def test_a_context_that_is_over_ends_where_nobody_told_of_its_end(cluster: Cluster) -> None:
    first, second, third = cluster.workers
    with first.context() as context_id:
        pass
    assert third.service.contexts.get_or_create(context_id, first.agent.info.incarnation) is not None, (
        "a call is late, and its sender dies"
    )
    cluster.kill(second)
    until(lambda: third.service.contexts.find(context_id) is None, "the context is released")


def test_a_worker_that_a_group_does_not_know_any_more_is_lost(cluster: Cluster) -> None:
    info = RecvInfo(b"gone", GlobalId(7, 0, b"gone"))
    with pytest.raises(PeerLostError, match="the worker of rank 7 is not in the group any more"):
        cluster.workers[0].service.may_answer_with(info)


def test_a_late_message_does_not_bring_a_context_back(cluster: Cluster) -> None:
    first, second, _ = cluster.workers
    with first.context() as context_id:
        first.call(second, lambda _: None)
    until(lambda: second.service.contexts.find(context_id) is None, "the context is released")
    hook = second.agent.hooks["autograd"]
    tensor = ones()
    payload = Payload(tensors=[tensor])
    with hook.receive(first.agent.info, [context_id, [0, 7, first.agent.info.incarnation]], payload, False):
        assert second.service.contexts.find_current() is None
    assert payload.tensors[0] is tensor
    assert second.service.debug_info()["num_autograd_contexts"] == 0


def test_ids_have_the_rank_above_a_counter(cluster: Cluster) -> None:
    worker = cluster.workers[2]
    seen = set()
    for _ in range(3):
        with worker.context() as context_id:
            assert context_id >> 48 == 2
            seen.add(context_id)
    assert len(seen) == 3
    assert worker.service.contexts.max_id == (2 << 48) + 281474976710655


def test_who_comes_again_under_a_rank_has_other_contexts() -> None:
    infos = [WorkerInfo("guest", 2, life) for life in (b"life 1", b"life 2")]
    lives = [ContextContainer(lambda info=info: info) for info in infos]  # type: ignore[misc]
    first, second = (life.new().context_id for life in lives)
    assert first >> 48 == second >> 48 == 2
    assert first != second


def test_a_context_ends_with_the_life_of_its_creator_and_not_with_another_of_its_rank(cluster: Cluster) -> None:
    """Its creator came again before the loss of its earlier life is told of here; and nothing late brings it back."""
    first, second, third = cluster.workers
    contexts = second.service.contexts
    earlier, later = WorkerInfo("worker0", 0, b"earlier."), first.agent.info
    number = contexts.max_id
    assert contexts.get_or_create(number, earlier.incarnation) is not None
    assert contexts.get_or_create(number + 1, later.incarnation) is not None
    second.service.on_peer_lost(earlier, "it died")
    assert contexts.find(number) is None
    assert contexts.find(number + 1) is not None
    with third.context() as context_id:
        meta = [number, None, 0, earlier.incarnation]
        with second.agent.hooks["autograd"].receive(third.agent.info, meta, Payload(), False):
            assert contexts.find_current() is None
        third.call(second, lambda _: None)
        assert contexts.find(context_id) is not None


def test_who_hands_on_a_context_says_whose_it_is(cluster: Cluster) -> None:
    """A worker that hears of a context from another than its creator drops it when its creator is lost."""
    first, second, third = cluster.workers

    def seen_by_third(worker: Worker) -> Any:
        hook = worker.agent.hooks["autograd"]
        return hook.send(third.agent.info, PythonCall(), Payload(), None)

    with first.context() as context_id:
        assert first.agent.hooks["autograd"].send(second.agent.info, PythonCall(), Payload(), None) == [
            context_id,
            None,
        ]
        meta = first.call(second, seen_by_third)
        assert meta == [context_id, None, 0, first.agent.info.incarnation]
        with third.agent.hooks["autograd"].receive(second.agent.info, meta, Payload(), False):
            assert third.service.contexts.get(context_id).creator == first.agent.info.incarnation


def test_a_context_whose_creator_was_lost_before_is_not_made(cluster: Cluster) -> None:
    """A call of its that comes late, from another worker, is served without one."""
    first, second, third = cluster.workers
    with first.context() as context_id:
        meta = [context_id, None, 0, first.agent.info.incarnation]
        cluster.kill(first)
        with third.agent.hooks["autograd"].receive(second.agent.info, meta, Payload(), False):
            assert third.service.contexts.find_current() is None
    assert third.service.debug_info()["num_autograd_contexts"] == 0


def test_a_thread_has_one_context_at_a_time(cluster: Cluster) -> None:
    worker = cluster.workers[0]
    with worker.context(), pytest.raises(AutogradError, match="Already have an autograd context id for this thread"):
        worker.service.contexts.new()


def test_no_context(cluster: Cluster) -> None:
    worker = cluster.workers[0]
    with pytest.raises(AutogradError, match="Current thread doesn't have a valid autograd context"):
        worker.service.contexts.current()


def test_the_callee_runs_in_the_callers_context(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    with here.context() as context_id:
        assert here.call(there, lambda worker: worker.service.contexts.current().context_id) == context_id
    assert here.call(there, lambda worker: worker.service.contexts.find_current()) is None


# ---- the graph as people see it --------------------------------------------------------------------------------


def test_send_and_receive_functions_look_as_in_torch(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a, b = ones(), ones()
    with here.context() as context_id:
        result = here.call(there, multiply, a, b)
        context = here.service.contexts.current()
        (send,) = context._send_functions().values()
        (recv,) = context._recv_functions().values()
        assert send.name() == "torch::distributed::autograd::SendRpcBackward"
        assert [node.name() for node, _ in send.next_functions if node] == ["torch::autograd::AccumulateGrad"] * 2
        assert send.next_functions[0][0].variable is a  # type: ignore[union-attr]
        assert recv is result.grad_fn
        assert recv.name() == "torch::distributed::autograd::RecvRpcBackward"
        remote = there.service.contexts.get(context_id)
        (answer,) = remote._send_functions().values()
        product = answer.next_functions[0][0]
        assert product is not None
        assert product.name() == "MulBackward0"
        assert product.next_functions[0][0] is product.next_functions[1][0]
        del result
        assert recv.next_functions  # the node lives on without its tensors


def test_operators_carry_the_context_only_with_tensors_that_require_grad(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    hook, to = here.agent.hooks["autograd"], there.agent.info
    builtin, python, plain = BuiltinCall("aten::add"), PythonCall(), Payload(tensors=[torch.ones(2)])
    assert hook.send(to, python, plain, None) is None
    with here.context() as context_id:
        assert hook.send(to, builtin, plain, None) is None
        assert hook.send(to, python, plain, None) == [context_id, None]
        meta: Any = hook.send(to, builtin, Payload(tensors=[ones()]), None)
        assert meta[0] == context_id
        assert isinstance(meta[1], GlobalId)
        with torch.no_grad():
            assert hook.send(to, builtin, plain, None) is None
            assert hook.send(to, builtin, Payload(tensors=[ones()]), None) == [None, None, 1]
        assert hook.send(to, builtin, plain, [context_id, None]) is None


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roots", "text"),
    [
        ([], "No tensors provided for gradient computation"),
        ([torch.ones(1)], "requires_grad not set on"),
        ([torch.ones(3, requires_grad=True) * 2], "is not a scalar, all roots need to be scalar"),
        ([torch.ones(1, requires_grad=True)], "does not have a valid gradient function"),
    ],
)
def test_roots_that_cannot_be_differentiated(cluster: Cluster, roots: list[torch.Tensor], text: str) -> None:
    here = cluster.workers[0]
    with here.context() as context_id, pytest.raises(AutogradError, match=text):
        here.backward(context_id, *roots)


def test_an_error_on_another_worker_names_it(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    with here.context() as context_id:
        loss = here.call(there, raising, a).sum()
        with pytest.raises(AutogradError, match=r"^Error on Node 1: raised on purpose$"):
            here.backward(context_id, loss)
        until(lambda: idle(cluster), "no pass is under way")


def test_an_error_that_comes_home_names_this_worker(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    with here.context() as context_id:
        loss = here.call(there, multiply, raising(here, a), a).sum()
        with pytest.raises(AutogradError, match=r"^Error on Node 0: raised on purpose$"):
            here.backward(context_id, loss)
        until(lambda: idle(cluster), "no pass is under way")


def test_an_error_of_the_first_run_is_raised_as_it_is(cluster: Cluster) -> None:
    here = cluster.workers[0]
    with here.context() as context_id, pytest.raises(ValueError, match="raised on purpose"):
        here.backward(context_id, raising(here, ones()).sum())


def test_after_an_error_the_next_pass_is_right(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there, _ = cluster.workers
    a = ones()
    with here.context() as context_id:
        loss = here.call(there, raising, a).sum()
        for _ in range(3):
            with pytest.raises(AutogradError, match="raised on purpose"):
                here.backward(context_id, loss, retain_graph=True)
        monkeypatch.setattr(Raise, "raises", False)
        here.backward(context_id, loss, retain_graph=True)
        assert torch.equal(here.gradients(context_id)[a], torch.ones(3))


def test_a_pass_may_begin_as_soon_as_the_one_before_has_raised(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that heard of the failure, which is another one, may not have told the context yet."""
    here, there, _ = cluster.workers
    caller, has_raised, end_pass = threading.current_thread(), threading.Event(), DistAutogradContext.end_pass

    def end_late(context: DistAutogradContext, pass_id: GlobalId) -> None:
        if context in here.service.contexts.all() and threading.current_thread() is not caller:
            has_raised.wait(10)
        end_pass(context, pass_id)

    monkeypatch.setattr(DistAutogradContext, "end_pass", end_late)
    with here.context() as context_id:
        loss = here.call(there, raising, ones()).sum()
        for _ in range(2):
            with pytest.raises(AutogradError, match="raised on purpose"):
                here.backward(context_id, loss, retain_graph=True)
        has_raised.set()


def test_an_error_frees_those_who_wait_for_gradients(cluster: Cluster) -> None:
    first, second, third = cluster.workers
    a = ones()

    def middle(worker: Worker, a: torch.Tensor) -> torch.Tensor:
        kept = a * 2
        once = worker.call(third, multiply, kept, kept)
        twice = worker.call(third, multiply, raising(worker, kept), kept)
        total: torch.Tensor = once + twice
        return total

    with first.context() as context_id:
        loss = first.call(second, middle, a).sum()
        with pytest.raises(AutogradError, match="Error on Node 1: raised on purpose"):
            first.backward(context_id, loss)
        until(lambda: idle(cluster), "no pass is under way")


@pytest.mark.parametrize("smart", [False, True])
def test_a_worker_that_dies_during_backward(cluster: Cluster, smart: bool) -> None:
    first, second, third = cluster.workers
    a = ones()
    with first.context() as context_id:
        loss = first.call(second, lambda worker, a: worker.call(third, multiply, a, a), a).sum()
        release = cluster.network.hold_gradients()

        def kill_and_release() -> None:
            cluster.kill(third)
            release.set()

        killer = threading.Thread(target=kill_and_release)
        killer.start()
        with pytest.raises((PeerLostError, AutogradError), match="worker2"):
            first.backward(context_id, loss, smart=smart)
        killer.join()
        until(lambda: idle(cluster), "no pass is under way")


def test_a_worker_that_dies_before_it_sends_gradients(cluster: Cluster) -> None:
    first, second, _ = cluster.workers
    a = ones()
    errors: list[BaseException] = []

    def run(context_id: int) -> None:
        try:
            first.backward(context_id, (a * 2).sum())
        except PeerLostError as error:
            errors.append(error)

    with first.context() as context_id:
        first.call(second, multiply, a, a)  # its gradients never come
        thread = threading.Thread(target=run, args=(context_id,))
        thread.start()
        until(lambda: first.service.debug_info()["num_current_backward_passes"] == 1, "the pass has begun")
        cluster.kill(second)
        thread.join()
        assert "worker1" in str(errors[0])


def test_a_pass_that_waits_ends_when_its_worker_shuts_down(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    errors: list[BaseException] = []

    def run(context_id: int) -> None:
        try:
            here.backward(context_id, (a * 3).sum())
        except AgentClosedError as error:
            errors.append(error)

    with here.context() as context_id:
        here.call(there, multiply, a, a)  # its gradients never come
        thread = threading.Thread(target=run, args=(context_id,))
        thread.start()
        until(lambda: here.service.debug_info()["num_current_backward_passes"] == 1, "the pass has begun")
        here.service.close()
        thread.join()
    assert errors


def test_contexts_of_a_dead_worker_are_dropped(cluster: Cluster) -> None:
    first, second, third = cluster.workers
    first.service.contexts.new()
    first.call(second, lambda worker: worker.call(third, lambda _: None))
    assert third.service.debug_info()["num_autograd_contexts"] == 1
    cluster.kill(first)
    until(
        lambda: not any(w.service.debug_info()["num_autograd_contexts"] for w in (second, third)),
        "the contexts are released",
    )


def test_a_new_pass_takes_the_place_of_one_that_failed_elsewhere(cluster: Cluster) -> None:
    here, there, _ = cluster.workers
    a = ones()
    with here.context() as context_id:
        loss = here.call(there, multiply, a, a).sum()
        context = there.service.contexts.get(context_id)
        stale = there.service._join(context, GlobalId(2, 6), False, began_here=False)
        here.backward(context_id, loss)
        with pytest.raises(AutogradError, match="is over here"):
            context.join_pass(stale.pass_id, lambda: stale)


def test_only_one_pass_begins_in_a_context_at_a_time(cluster: Cluster) -> None:
    here = cluster.workers[0]
    a = ones()
    doubled = a * 2
    seen: list[BaseException] = []

    def again(gradient: torch.Tensor) -> None:
        try:
            here.backward(context_id, total)
        except AutogradError as error:
            seen.append(error)

    doubled.register_hook(again)  # type: ignore[no-untyped-call]
    with here.context() as context_id:
        total = doubled.sum()
        here.backward(context_id, total)
    assert "under way" in str(seen[0])
