"""Send functions of what operators made: which are run by themselves, and that they give what torch's engine gives."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd import Function

from zrpc.autograd.functions import RecvInfo, SendFunction, record_recv
from zrpc.autograd.local import LocalPass
from zrpc.autograd.operators import Operator, OperatorSend, add
from zrpc.errors import AutogradError
from zrpc.ids import GlobalId

if TYPE_CHECKING:
    from zrpc.autograd.functions import Gradients

ID = GlobalId(0, 1)
INFO = RecvInfo(1, GlobalId(1, 1))


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices that require grad, the second of another shape, and one that does not."""
    a = torch.arange(1.0, 7.0).reshape(2, 3).requires_grad_()
    return a, torch.tensor([[0.5, 2.0, 3.0]], requires_grad=True), torch.full((2, 3), 3.0)


def received() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, the two as outputs of one receive function."""
    a, b, c = tensors()
    first, second = record_recv(INFO, [a.detach().requires_grad_(), b.detach().requires_grad_()])[1]
    return first, second, c


class Twice(Function):
    """A node whose backward is Python."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


Program = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BY_THEMSELVES: dict[str, Program] = {
    "add": lambda a, b, c: torch.add(a, b),
    "add twice the same": lambda a, b, c: torch.add(a, a),
    "mul": lambda a, b, c: torch.mul(a, b),
    "mul twice the same": lambda a, b, c: torch.mul(a, a),
    "what needs none": lambda a, b, c: torch.mul(a, c),
    "the second alone": lambda a, b, c: torch.mul(c, b),
    "matmul": lambda a, b, c: torch.mm(a, c.t()),
    "cat": lambda a, b, c: torch.cat([a, b, a]),
    "stack": lambda a, b, c: torch.stack([a, a, c]),
    "where": lambda a, b, c: torch.where(c > 2, a, b),
    "view": lambda a, b, c: a.t(),
    "in place": lambda a, b, c: a.add_(b),
    "sum": lambda a, b, c: a.sum(),
    "double": lambda a, b, c: torch.add(a, torch.ones(2, 3, dtype=torch.float64)),
    "one of several": lambda a, b, c: torch.max(a, 0).values,
}

PLANNED_FOR: dict[str, Program] = {
    "two nodes": lambda a, b, c: torch.exp(a * b),
    "a node of several inputs": lambda a, b, c: torch.unbind(a)[0],
    "a Python node": lambda a, b, c: Twice.apply(a),  # type: ignore[no-untyped-call,no-any-return]
    "what came": lambda a, b, c: a,
    "in place of a part": lambda a, b, c: _add_to_first_row(a * 1),
    "a leaf": lambda a, b, c: torch.ones(2, 3, requires_grad=True),
    "a node of no class of its own": lambda a, b, c: torch._foreach_mul([a], [c])[0],
    "complex of real": lambda a, b, c: torch.mul(a, torch.tensor(2j)),
    "real or complex": lambda a, b, c: torch.where(c > 2, a, c * 1j),
    "something of its own": lambda a, b, c: torch.mul(a, torch.ones(2, 3, requires_grad=True)),
}


def _add_to_first_row(a: torch.Tensor) -> torch.Tensor:
    a[0].add_(1)
    return a


def gradient_for(result: torch.Tensor) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + result.numel()).reshape(result.shape).to(result.dtype)


@pytest.mark.parametrize("name", BY_THEMSELVES)
@pytest.mark.parametrize("is_repeated", [False, True])
def test_an_operator_gives_what_torchs_engine_gives(name: str, is_repeated: bool) -> None:
    program = BY_THEMSELVES[name]
    a, b, c = tensors()
    result = program(a * 1, b * 1, c)
    gradient = torch.ones((), dtype=result.dtype).expand(result.shape) if is_repeated else gradient_for(result)
    expected = torch.autograd.grad(result, [a, b], gradient, allow_unused=True)

    operator = OperatorSend([program(*received())], to=1).operator
    assert operator is not None
    got = operator.run(gradient)
    assert operator.info == INFO
    assert len(got) == 2
    for mine, its in zip(got, expected, strict=True):
        if its is None:
            assert mine is None
        else:
            assert mine is not None
            assert mine.dtype is its.dtype
            assert torch.equal(mine, its)


@pytest.mark.parametrize("name", PLANNED_FOR)
def test_what_is_no_single_node_is_left_to_the_plan(name: str) -> None:
    send = OperatorSend([PLANNED_FOR[name](*received())], to=1)
    assert send.operator is None
    assert len(send.next_functions) == 1


def test_several_results_are_left_to_the_plan() -> None:
    a, b, _ = received()
    assert OperatorSend([a + b, a * b], to=1).operator is None


def test_no_gradient_is_handed_on_as_none() -> None:
    a, b, _ = received()
    operator = OperatorSend([a * b], to=1).operator
    assert operator is not None
    assert operator.run(None) == [None, None]


def test_a_gradient_of_another_shape_and_dtype_is_made_to_fit() -> None:
    a, b, _ = received()
    operator = OperatorSend([a * b], to=1).operator
    assert operator is not None
    for_a, for_b = operator.run(torch.ones(4, 2, 3, dtype=torch.float64))
    assert for_a is not None
    assert for_a.dtype is torch.float32
    assert torch.equal(for_a, 4 * b.detach().expand(2, 3))
    assert for_b is not None
    assert torch.equal(for_b, 4 * a.detach().sum(0, keepdim=True))


def test_a_repeated_gradient_of_a_tensor_that_was_given_twice_needs_no_memory() -> None:
    a, *_ = received()
    operator = OperatorSend([torch.add(a, a)], to=1).operator
    assert operator is not None
    gradient, _ = operator.run(torch.ones(()).expand(2, 3))
    assert gradient is not None
    assert gradient.stride() == (0, 0)
    assert gradient.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(()).expand(2, 3), torch.full((), 2.0).expand(2, 3)),
        (torch.arange(3.0).expand(2, 3), torch.full((), 2.0).expand(2, 3)),
        (torch.arange(3.0).expand(2, 3), torch.arange(2.0)[:, None].expand(2, 3)),
        (torch.arange(6.0).reshape(2, 3), torch.ones(()).expand(2, 3)),
        (torch.ones(()).expand(0, 3), torch.ones(()).expand(0, 3)),
        (torch.ones(()), torch.ones(())),
        (torch.eye(2).to_sparse(), torch.ones(2, 2)),
        (torch.ones(2, 2), torch.eye(2).to_sparse()),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
    ],
)
def test_sums(one: torch.Tensor, other: torch.Tensor) -> None:
    total = add(one, other)
    assert total.shape == one.shape
    assert torch.equal(total.to_dense(), one.to_dense() + other.to_dense())


# ---- in passes -------------------------------------------------------------------------------------------------


def run(sends: dict[GlobalId, SendFunction], gradients: Gradients, retain_graph: bool = False) -> list[Gradients]:
    """A pass to which gradients for the first send function come; what receive functions got."""
    delivered: list[Gradients] = []
    local = LocalPass([], sends, retain_graph, lambda info, got: delivered.append(got), lambda taken: None)
    local.look_ahead()
    local.run_send(next(iter(sends)), gradients)
    local.close()
    return delivered


def test_a_pass_runs_it_and_is_finished_when_all_have_run() -> None:
    a, b, _ = received()
    other = record_recv(INFO, [torch.ones(2, requires_grad=True)])[1][0]
    sends: dict[GlobalId, SendFunction] = {
        ID: OperatorSend([a * b], to=1),
        GlobalId(0, 2): OperatorSend([other + 1], to=2),
        GlobalId(0, 3): SendFunction([torch.exp(other * 2)], to=3),
    }
    delivered: list[Gradients] = []
    local = LocalPass([], sends, False, lambda info, got: delivered.append(got), lambda taken: None)
    assert local.awaited() == {1, 2, 3}
    local.run_send(GlobalId(0, 2), [torch.ones(2)])
    assert local.awaited() == {1, 3}
    local.run_send(GlobalId(0, 3), [torch.zeros(2)])
    assert not local.finished
    with pytest.raises(AutogradError, match="2 gradients came for 1 tensors"):
        local.run_send(ID, [None, None])
    assert len(delivered) == 2


def test_what_was_saved_is_freed_and_a_second_pass_says_so() -> None:
    a, b, _ = received()
    saved = weakref.ref(b)
    sends: dict[GlobalId, SendFunction] = {ID: OperatorSend([a * b], to=1)}
    del a, b
    run(sends, [torch.ones(2, 3)], retain_graph=True)
    assert saved() is not None
    assert len(run(sends, [torch.ones(2, 3)])) == 1
    assert saved() is None
    with pytest.raises(AutogradError, match="retain_graph=True"):
        run(sends, [torch.ones(2, 3)])


def test_a_pass_may_be_over_before_the_answer_has_been_followed_up() -> None:
    a, b, _ = received()
    send = OperatorSend([a * b], to=1)
    assert len(run({ID: send}, [torch.ones(2, 3)])) == 1
    send.prepare()
    assert send.next_functions == ()
    with pytest.raises(AutogradError, match="a second time"):
        send.locate()


class RunsAPass(Function):
    """Its backward runs a distributed pass."""

    sends: dict[GlobalId, SendFunction]
    delivered: list[Gradients]

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        RunsAPass.delivered = run(RunsAPass.sends, [torch.ones(2, 3)])
        return gradient


def test_a_pass_within_another_that_wants_something_else() -> None:
    """Nodes that are called inside torch's engine leave out what it does not want."""
    a, b, _ = received()
    RunsAPass.sends = {ID: OperatorSend([a * b], to=1)}
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(RunsAPass.apply(x).sum(), [x])  # type: ignore[no-untyped-call]
    (gradients,) = RunsAPass.delivered
    for_a = gradients[0]
    assert for_a is not None
    assert torch.equal(for_a, b.detach().expand(2, 3))


def test_what_saves_nothing_can_be_run_again_as_in_torch() -> None:
    a, b, _ = received()
    sends: dict[GlobalId, SendFunction] = {ID: OperatorSend([a + b], to=1)}
    assert [len(run(sends, [torch.ones(2, 3)])) for _ in range(2)] == [1, 1]


def test_where_somebody_looks_torchs_engine_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []

    def note(operator: Operator, gradient: torch.Tensor | None) -> Gradients:
        ran.append(operator)
        return [gradient, None]

    monkeypatch.setattr(Operator, "run", note)
    a, b, _ = received()
    sends: dict[GlobalId, SendFunction] = {ID: OperatorSend([a + b], to=1)}
    run(sends, [torch.ones(2, 3)])
    assert len(ran) == 1
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=False):
        run(sends, [torch.ones(2, 3)])
    with torch.profiler.profile() as profile:
        run(sends, [torch.ones(2, 3)])
    assert len(ran) == 1
    assert any("RecvRpcBackward" in event.name for event in profile.events())
