"""RemoteModule between processes: forward, gradients, optimizer, passing it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import zrpc as rpc
import zrpc.autograd as dist_autograd
from zrpc.nn import RemoteModule
from zrpc.optim import DistributedOptimizer

if TYPE_CHECKING:
    from tests.integration.harness import Cluster


def linear() -> nn.Linear:
    """The same weights wherever it is called."""
    torch.manual_seed(3)
    return nn.Linear(4, 2)


def train_remotely(rank: int) -> list[torch.Tensor] | None:
    """One optimizer step on a module of worker1, driven by worker0: its weights before and after."""
    if rank != 0:
        return None
    module = RemoteModule("worker1/cpu", linear)
    parameters = module.remote_parameters()
    assert all(parameter.owner_name() == "worker1" for parameter in parameters)
    before = [parameter.to_here() for parameter in parameters]
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=0.5)
    with dist_autograd.context() as context_id:
        loss = module.forward_async(torch.ones(3, 4)).wait().square().sum()
        dist_autograd.backward(context_id, [loss])
        optimizer.step(context_id)
    return [*before, *(parameter.to_here() for parameter in parameters)]


def test_it_trains_as_a_local_module_does(cluster_in_each_mode: Cluster) -> None:
    (seen, _) = cluster_in_each_mode.run(train_remotely)
    local = linear()
    expected = [parameter.detach().clone() for parameter in local.parameters()]
    optimizer = torch.optim.SGD(local.parameters(), lr=0.5)
    local(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    expected += [parameter.detach() for parameter in local.parameters()]
    torch.testing.assert_close([tensor.detach() for tensor in seen], expected, rtol=0, atol=0)


def use(module: RemoteModule) -> torch.Tensor:
    return module(torch.ones(4))


def remake(rref: rpc.RRef[nn.Module]) -> torch.Tensor:
    return use(RemoteModule.init_from_module_rref("worker1/cpu", rref))


def pass_on(rank: int) -> tuple[bool, bool]:
    """worker0 makes a module on worker1; worker2 uses it."""
    if rank != 0:
        return True, True
    module = RemoteModule("rank:1/cpu", linear)
    mine = module(torch.ones(4))
    return (
        torch.equal(rpc.rpc_sync("worker2", use, args=(module,)), mine),
        torch.equal(rpc.rpc_sync("worker2", remake, args=(module.get_module_rref(),)), mine),
    )


def test_it_can_be_passed_on(cluster: Cluster) -> None:
    assert cluster.run(pass_on, 3) == [(True, True)] * 3
