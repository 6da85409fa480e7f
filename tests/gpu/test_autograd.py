"""RRefs, distributed autograd, optimizers and RemoteModule on a device, beside the same computed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import zrpc as rpc
import zrpc.autograd as dist_autograd
from tests.gpu.maps import BOTH, DEVICE, TIMEOUT_S
from zrpc.nn import RemoteModule
from zrpc.optim import DistributedOptimizer

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

STEPS = 10


class Net(nn.Module):
    """A layer after a wait, so that who does not wait for it reads old values."""

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(256, 256).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            torch.cuda._sleep(3_000_000)
        y: torch.Tensor = torch.relu(self.layer(x))
        return y

    def parameter_rrefs(self) -> list[rpc.RRef[Any]]:
        return [rpc.RRef(parameter) for parameter in self.parameters()]


def compare_rref_and_sync(rank: int) -> None:
    if rank:
        return
    net = rpc.remote("worker1", Net)
    for _ in range(STEPS):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            x = torch.randn(300, 256, device=DEVICE)
            assert torch.equal(net.remote().forward(x).to_here(), net.rpc_sync().forward(x))
            assert torch.equal(net.remote().forward(x).to_here_async().wait(), net.rpc_async().forward(x).wait())


def test_values_of_rrefs_are_there_when_they_are_fetched(cluster: Cluster) -> None:
    cluster.run(compare_rref_and_sync, device_maps=BOTH, timeout_s=TIMEOUT_S)


def train(rank: int) -> tuple[list[float], list[float]]:
    """Losses of a model on worker1's device, and of its like here."""
    if rank:
        return [], []
    remote_net, local_net = rpc.remote("worker1", Net), Net()
    remote_optimizer = DistributedOptimizer(torch.optim.SGD, remote_net.rpc_sync().parameter_rrefs(), lr=0.1)
    local_optimizer = torch.optim.SGD(local_net.parameters(), lr=0.1)
    remote_losses, local_losses = [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        x = torch.randn(64, 256, device=DEVICE, requires_grad=True)
        with dist_autograd.context() as context_id:
            loss = remote_net.rpc_sync().forward(x).square().sum()
            dist_autograd.backward(context_id, [loss])
            gradient = dist_autograd.get_gradients(context_id)[x]
            remote_optimizer.step(context_id)
        local_loss = local_net(x).square().sum()
        local_optimizer.zero_grad()
        local_loss.backward()
        local_optimizer.step()
        assert gradient.device == x.device
        assert x.grad is not None
        torch.testing.assert_close(gradient, x.grad)
        remote_losses.append(loss.item())
        local_losses.append(local_loss.item())
    return remote_losses, local_losses


def test_training_on_another_workers_device(cluster: Cluster) -> None:
    remote_losses, local_losses = cluster.run(train, device_maps=BOTH, timeout_s=TIMEOUT_S)[0]
    assert len(remote_losses) == STEPS
    torch.testing.assert_close(torch.tensor(remote_losses), torch.tensor(local_losses))


def there_and_back(rank: int, x: torch.Tensor) -> torch.Tensor:
    """Calls the caller back, so that gradients go each way in both kinds of messages."""
    y: torch.Tensor = rpc.rpc_sync(f"worker{1 - rank}", torch.mul, args=(x, 3.0))
    return y + x


def nest(rank: int) -> None:
    if rank:
        return
    x = torch.randn(1000, device=DEVICE, requires_grad=True)
    with dist_autograd.context() as context_id:
        y = rpc.rpc_sync("worker1", there_and_back, args=(1, x))
        dist_autograd.backward(context_id, [y.sum()])
        assert torch.equal(dist_autograd.get_gradients(context_id)[x], torch.full_like(x, 4.0))


def test_nested_calls(cluster: Cluster) -> None:
    cluster.run(nest, device_maps=BOTH)


def run_remote_module(rank: int, has_map: bool) -> list[str]:
    if rank:
        return []
    module = RemoteModule(f"worker1/{DEVICE}", Net, args=("cpu",))
    local = Net("cpu")
    x = torch.randn(10, 256, requires_grad=True)
    devices = [str(module.forward(x.detach()).device)]
    with dist_autograd.context() as context_id:
        y = module.forward_async(x.to(DEVICE) if has_map else x).wait()
        devices.append(str(y.device))
        dist_autograd.backward(context_id, [y.square().sum()])
        gradient = dist_autograd.get_gradients(context_id)[x]
    local(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(gradient, x.grad, rtol=1e-3, atol=1e-3)
    return devices


@pytest.mark.parametrize("has_map", [True, False])
def test_a_remote_module_on_a_device(cluster: Cluster, has_map: bool) -> None:
    options = {"device_maps": BOTH} if has_map else {}
    expected = [DEVICE, DEVICE] if has_map else ["cpu", "cpu"]
    assert cluster.run(run_remote_module, args=(has_map,), **options)[0] == expected
