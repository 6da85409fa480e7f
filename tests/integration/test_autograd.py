"""Distributed autograd and the distributed optimizer between real worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import zrpc as rpc
from tests.waiting import until
from zrpc import autograd
from zrpc.errors import AutogradError
from zrpc.optim import DistributedOptimizer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.harness import Cluster

STEPS = 3


def layer(seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(4, 4, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(torch.rand(4, 4, generator=generator))
        made.bias.copy_(torch.rand(4, generator=generator))
    return made


def batch(step: int) -> torch.Tensor:
    return torch.rand(8, 4, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)


def forward(stage: rpc.RRef[nn.Module], x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = torch.tanh(stage.local_value()(x))
    return output


def parameters(stage: rpc.RRef[nn.Module]) -> list[rpc.RRef[torch.Tensor]]:
    return [rpc.RRef(parameter) for parameter in stage.local_value().parameters()]


def values(stage: rpc.RRef[nn.Module]) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in stage.local_value().parameters()]


def train_here() -> list[torch.Tensor]:
    stages = [layer(1), layer(2)]
    everything = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = torch.optim.Adam(everything, lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(step)
        for stage in stages:
            x = torch.tanh(stage(x))
        torch.autograd.backward(x.sum())
        optimizer.step()
    return [parameter.detach() for parameter in everything]


def train_elsewhere(rank: int) -> None:
    if rank:
        return
    stages = [rpc.remote(f"worker{1 + index}", layer, args=(1 + index,)) for index in range(2)]
    everything = [one for stage in stages for one in rpc.rpc_sync(stage.owner(), parameters, args=(stage,))]
    optimizer = DistributedOptimizer(torch.optim.Adam, everything, lr=0.1)
    for step in range(STEPS):
        with autograd.context() as context_id:
            x = batch(step)
            for stage in stages:
                x = rpc.rpc_sync(stage.owner(), forward, args=(stage, x))
            autograd.backward(context_id, [x.sum()])
            optimizer.step(context_id)
    trained = [value for stage in stages for value in rpc.rpc_sync(stage.owner(), values, args=(stage,))]
    for mine, its in zip(train_here(), trained, strict=True):
        assert torch.equal(mine, its)


def test_training_elsewhere_is_training_here(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(train_elsewhere, 3)


def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


def backward_of_an_rref(rank: int) -> None:
    if rank:
        return
    x = torch.ones(3, requires_grad=True)
    with autograd.context() as context_id:
        result = rpc.remote("worker1", total, args=(x,))
        result.backward(context_id, retain_graph=True)
        result.backward(context_id)
        assert torch.equal(autograd.get_gradients(context_id)[x], torch.full((3,), 2.0))
    with pytest.raises(AutogradError, match="Could not find autograd context with id: 100"):
        rpc.RRef(x.sum()).backward(100)


def test_backward_of_an_rref(cluster: Cluster) -> None:
    cluster.run(backward_of_an_rref, 2)


def contexts_end(rank: int) -> None:
    if rank:
        return
    x = torch.ones(2, 2, requires_grad=True)
    with autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", torch.add, args=(x, x)).sum()
        autograd.backward(context_id, [loss])
        assert rpc.rpc_sync("worker1", autograd._get_debug_info)["num_autograd_contexts"] == 1
    until(
        lambda: rpc.rpc_sync("worker1", autograd._get_debug_info)["num_autograd_contexts"] == 0,
        "worker1 has released the context",
    )


def test_contexts_end_everywhere(cluster: Cluster) -> None:
    cluster.run(contexts_end, 2)


OPERATORS = (
    (torch.add, lambda a, b: (a, a)),
    (torch.mul, lambda a, b: (a, a)),
    (torch.mm, lambda a, b: (a, b)),
    (torch.cat, lambda a, b: ([a, b, a],)),
    (torch.relu, lambda a, b: (a,)),
    (torch.logsumexp, lambda a, b: (a, 0)),
    (torch.nn.functional.linear, lambda a, b: (a, b, b[0])),
)


def operators_elsewhere(rank: int) -> None:
    if rank:
        return
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.rand(300, 300, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    for operator, arguments_of in OPERATORS:
        for tensors in (leaves, [leaf * 2 for leaf in leaves]):
            here = operator(*arguments_of(*tensors)).sum()
            expected = torch.autograd.grad(here, leaves, allow_unused=True, retain_graph=True)
            with autograd.context() as context_id:
                results = [rpc.rpc_sync("worker1", operator, args=arguments_of(*tensors)) for _ in range(2)]
                loss = results[0].sum() + 0 * results[1].sum()
                for retain_graph in (True, False):
                    autograd.backward(context_id, [loss], retain_graph=retain_graph)
                got = autograd.get_gradients(context_id)
                for leaf, gradient in zip(leaves, expected, strict=True):
                    if gradient is None:
                        assert leaf not in got
                    else:
                        torch.testing.assert_close(got[leaf], 2 * gradient)
                        assert got[leaf].is_contiguous()


def test_operators_elsewhere_are_differentiated_as_here(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(operators_elsewhere, 2)


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


LIBRARY = torch.library.Library("zrpc_tests", "DEF")
LIBRARY.define("bounded(Tensor x) -> Tensor")


def bounded(x: torch.Tensor) -> torch.Tensor:
    result = x.clone()
    result.register_hook(lambda gradient: gradient.clamp(-1, 1))  # type: ignore[no-untyped-call]
    return result


LIBRARY.impl("bounded", bounded, "CompositeImplicitAutograd")


def hooks_in_operators(rank: int) -> None:
    if rank:
        return
    x = torch.ones(3, requires_grad=True)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("worker1", torch.ops.zrpc_tests.bounded, args=(x,))
        autograd.backward(context_id, [(result * 5).sum()])
        assert torch.equal(autograd.get_gradients(context_id)[x], torch.ones(3))


def test_hooks_that_an_operator_of_the_users_sets_are_run(cluster: Cluster) -> None:
    cluster.run(hooks_in_operators, 2)


def gradients_of_one_sum(rank: int) -> None:
    if rank:
        return
    for size in (4, 300_000):
        for function in (torch.add, add):
            x, y = [torch.ones(size, requires_grad=True) for _ in range(2)]
            weights = torch.arange(float(size))
            with autograd.context() as context_id:
                autograd.backward(context_id, [(rpc.rpc_sync("worker1", function, args=(x, y)) * weights).sum()])
                gradients = autograd.get_gradients(context_id)
                assert torch.equal(gradients[x], weights)
                gradients[x].zero_()  # whoever has one may write to it; `clip_grad_norm_` does
                assert torch.equal(gradients[y], weights)


def test_no_two_leaves_share_a_gradient(cluster: Cluster) -> None:
    cluster.run(gradients_of_one_sum, 2)


def unused_results(rank: int) -> None:
    if rank:
        return
    x = torch.ones(2, requires_grad=True)
    with autograd.context() as context_id:
        rpc.rpc_sync("worker1", torch.mul, args=(x, x))
        autograd.backward(context_id, [(x * 3).sum()], mode="smart")
        assert torch.equal(autograd.get_gradients(context_id)[x], torch.full((2,), 3.0))


def test_smart_mode_passes_over_unused_results(cluster: Cluster) -> None:
    cluster.run(unused_results, 2)


def arguments(rank: int) -> None:
    del rank
    with autograd.context() as context_id:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            autograd.backward(context_id, None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="incompatible function arguments"):
            autograd.backward(None, [torch.ones(1)])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="mode"):
            autograd.backward(context_id, [torch.ones(1)], mode="clever")
    with pytest.raises(AutogradError, match="valid autograd context"):
        autograd._current_context()


def test_arguments(cluster: Cluster) -> None:
    cluster.run(arguments, 1)


def data_parallel(rank: int, method: str, store: str) -> None:
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(layer(1))
        weight = model.module.weight
        own = weight.grad = torch.full((4, 4), 7.0, dtype=torch.float64)
        x = batch(rank).requires_grad_()
        single = layer(1)
        for one in (0, 1):
            rest = torch.tanh(batch(one) * 2)
            torch.autograd.backward(single(rest).sum() / 2)
        with autograd.context() as context_id:
            hidden = rpc.rpc_sync(f"worker{1 - rank}", torch.tanh, args=(x * 2,))
            autograd.backward(context_id, [model(hidden).sum()])
            gradients = autograd.get_gradients(context_id)
            assert single.weight.grad is not None
            assert torch.allclose(gradients[weight], single.weight.grad, rtol=1e-12)
            assert x in gradients
        assert weight.grad is own
    finally:
        dist.barrier()
        dist.destroy_process_group()  # gloo has sockets open until the process ends
    rpc.shutdown()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_models_in_distributed_data_parallel_average_their_gradients(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run(data_parallel, 2, args=(cluster.new_init_method(), str(tmp_path / "gloo")), init=False)


def doubled(x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
    """Twice `x`, and the modes that this worker is in."""
    return 2 * x, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def doubled_by_another(to: str, x: torch.Tensor) -> Any:
    return rpc.rpc_sync(to, doubled, args=(x,))


@rpc.functions.async_execution
def doubled_later(to: str, x: torch.Tensor) -> Any:
    return rpc.rpc_async(to, doubled, args=(x,)).then(lambda future: future.wait())


def itself(x: torch.Tensor) -> torch.Tensor:
    return x


def grad_modes(rank: int, holds: bool) -> None:
    to, me = f"worker{1 - rank}", f"worker{rank}"
    x = torch.ones(3, requires_grad=True)
    held = rpc.RRef(x)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)):
        is_inference = mode is torch.inference_mode and holds
        with autograd.context():
            with mode():
                results = [
                    rpc.rpc_sync(to, doubled, args=(x,)),
                    rpc.rpc_async(to, doubled, args=(x,)).wait(),
                    rpc.remote(to, doubled, args=(x,)).to_here(),
                    rpc.rpc_sync(to, doubled_by_another, args=(me, x)),
                    rpc.rpc_sync(to, doubled_later, args=(me, x)),
                ]
                y = rpc.rpc_sync(to, torch.mul, args=(x, 2))
                view = rpc.rpc_sync(to, torch.ops.aten.view, args=(x, [3, 1]))
                same = rpc.rpc_sync(to, itself, args=(x,))
                fetched = rpc.rpc_sync(to, fetch, args=(held,))
            for result, grad, inference in results:
                assert (grad, inference) == (not holds, is_inference)
                assert result.requires_grad is not holds
            for result in (y, view, same, fetched):
                assert result.requires_grad is not holds
            after, grad, inference = rpc.rpc_sync(to, doubled, args=(x,))
            assert (after.requires_grad, grad, inference) == (True, True, False), "a mode outlived its call"
        with mode():
            _, grad, inference = rpc.rpc_sync(to, doubled, args=(x,))
            assert (grad, inference) == (True, False), "outside of a context"


def fetch(held: rpc.RRef[torch.Tensor]) -> torch.Tensor:
    return held.to_here()


@pytest.mark.parametrize("holds", [True, False])
def test_the_grad_mode_of_a_caller_holds_for_its_calls_unless_it_is_not_to(cluster: Cluster, holds: bool) -> None:
    cluster.run(grad_modes, 2, args=(holds,), propagate_grad_mode=holds)


def gradients_beside_no_grad(rank: int) -> None:
    """What is made without gradients is a constant to what is made with them, as on one worker."""
    to = f"worker{1 - rank}"
    x = torch.full((2,), 3.0, requires_grad=True)
    with autograd.context() as context_id:
        with torch.no_grad():
            constant, *_ = rpc.rpc_sync(to, doubled, args=(x,))
        y, *_ = rpc.rpc_sync(to, doubled, args=(x,))
        autograd.backward(context_id, [(y * constant).sum()])
        assert torch.equal(autograd.get_gradients(context_id)[x], torch.full((2,), 12.0))


def test_what_is_made_without_gradients_is_a_constant(cluster_in_each_mode: Cluster) -> None:
    cluster_in_each_mode.run(gradients_beside_no_grad, 2)


class Stage:
    """What an RRef refers to; its class is not known to the user before the first call."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
        return doubled(x)


def proxies_carry_the_context(rank: int) -> None:
    to = f"worker{1 - rank}"
    x = torch.full((2,), 3.0, requires_grad=True)
    for _ in range(2):
        with autograd.context() as context_id:
            stage = rpc.remote(to, Stage)
            y, *_ = stage.rpc_async().forward(x).wait()
            autograd.backward(context_id, [y.sum()])
            assert torch.equal(autograd.get_gradients(context_id)[x], torch.full((2,), 2.0))
        with autograd.context(), torch.no_grad():
            y, grad, _ = rpc.remote(to, Stage).rpc_async().forward(x).wait()
            assert (y.requires_grad, grad) == (False, False)


def test_a_proxy_calls_in_the_context_of_its_caller_though_it_asks_for_the_type_first(cluster: Cluster) -> None:
    cluster.run(proxies_carry_the_context, 2)


class CarriesTensorError(Exception):
    pass


_parameter = torch.nn.Parameter(torch.ones(2))


def fail_with_a_tensor() -> None:
    error = CarriesTensorError("x")
    error.tensor = _parameter * 2  # type: ignore[attr-defined]
    raise error


def switch_grad_off() -> None:
    torch.set_grad_enabled(False)


def errors_are_no_results(rank: int) -> None:
    to = f"worker{1 - rank}"
    x = torch.full((2,), 3.0, requires_grad=True)
    with autograd.context() as context_id:
        with pytest.raises(CarriesTensorError) as caught:
            rpc.rpc_sync(to, fail_with_a_tensor)
        assert torch.equal(caught.value.tensor, torch.full((2,), 2.0))  # type: ignore[attr-defined]
        y, *_ = rpc.rpc_sync(to, doubled, args=(x,))
        autograd.backward(context_id, [y.sum()])  # FAST mode waits for all that was sent as a result
        assert torch.equal(autograd.get_gradients(context_id)[x], torch.full((2,), 2.0))
        for _ in range(8):
            rpc.rpc_sync(to, switch_grad_off)
            y, grad, _ = rpc.rpc_sync(to, doubled, args=(x,))
            assert (grad, y.requires_grad) == (True, True), "one function switched gradients off for others"


def test_a_backward_pass_waits_for_no_tensor_of_an_error(cluster: Cluster) -> None:
    cluster.run(errors_are_no_results, 2)
