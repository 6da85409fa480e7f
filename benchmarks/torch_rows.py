"""What is measured of those that speak torch.distributed.rpc: a program of a user's, given the framework's modules.

The functions that are called stand here too: the callee imports this module.
"""

from __future__ import annotations

import importlib
import threading
from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.row import GB, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Sized

    from benchmarks.contender import TorchContender

Shape = tuple[int, ...]

RESNET18: list[Shape] = [
    *[(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4],
    *[(128, 64, 3, 3), *[(128, 128, 3, 3)] * 3],
    *[(256, 128, 3, 3), *[(256, 256, 3, 3)] * 3],
    *[(512, 256, 3, 3), *[(512, 512, 3, 3)] * 3],
    *[(1000, 512), *[(64,)] * 20, *[(128,)] * 25, *[(256,)] * 25, *[(512,)] * 25],
]
"""About the tensors of a ResNet-18's state: 113 of them, 44 MB (2^20 bytes) of float32."""
CALLERS, CALLS_EACH = 4, 800
GIVEN_NBYTES = 32 << 20
MODEL_NUMEL = 1 << 19
OBJECTS = [
    {"step": number, "reward": 0.5, "info": {"lives": 3, "name": f"actor{number}"}} for number in range(300)
]  # fmt: skip


# ---- on the callee --------------------------------------------------------------------------------------------------


def noop() -> None:
    """Nothing."""


def take(values: Sized) -> int:
    """How many `values` came."""
    return len(values)


def give(nbytes: int) -> torch.Tensor:
    """A fresh tensor of `nbytes` ones, uint8."""
    return torch.ones(nbytes, dtype=torch.uint8)


def give_state(shapes: Sequence[Shape]) -> dict[str, torch.Tensor]:
    """Fresh tensors of these shapes, float32."""
    return {str(number): torch.ones(shape) for number, shape in enumerate(shapes)}


def bounce(module: str, here: str, there: str, depth: int) -> int:
    """Call this function on `there`, which calls it back, until `depth` calls are nested; how many there were."""
    if depth == 0:
        return 0
    answer: int = importlib.import_module(module).rpc_sync(there, bounce, args=(module, there, here, depth - 1))
    return 1 + answer


class Model:
    """What a parameter server holds: `numel` weights, float32."""

    def __init__(self, numel: int) -> None:
        self._weights = torch.zeros(numel)

    def pull(self) -> torch.Tensor:
        """The weights."""
        return self._weights

    def push(self, gradient: torch.Tensor) -> None:
        """A step of gradient descent."""
        self._weights.add_(gradient, alpha=-0.1)


# ---- on the caller --------------------------------------------------------------------------------------------------


def _add(peer: TorchContender) -> Callable[[], object]:
    x = torch.ones(16)
    assert torch.equal(peer.rpc.rpc_sync(peer.callee, torch.add, args=(x, 1)), x + 1)
    return lambda: peer.rpc.rpc_sync(peer.callee, torch.add, args=(x, 1))


def _remote_to_here(peer: TorchContender) -> Callable[[], object]:
    return lambda: peer.rpc.remote(peer.callee, noop).to_here()


def _autograd_step(numel: int, peer: TorchContender) -> Callable[[], object]:
    """Forward and backward of `torch.add(x, x).sum()`, the addition there."""
    x = torch.ones(numel, requires_grad=True)

    def step() -> torch.Tensor:
        with peer.autograd.context() as context:
            y = peer.rpc.rpc_sync(peer.callee, torch.add, args=(x, x))
            peer.autograd.backward(context, [y.sum()])
            gradient: torch.Tensor = peer.autograd.get_gradients(context)[x]
            return gradient

    assert torch.equal(step(), torch.full_like(x, 2))
    return step


def _autograd_of_calls(calls: int, peer: TorchContender) -> Callable[[], object]:
    """A pass through several calls with the same tensor."""
    x = torch.ones(64, requires_grad=True)

    def step() -> torch.Tensor:
        with peer.autograd.context() as context:
            ys = [peer.rpc.rpc_sync(peer.callee, torch.mul, args=(x, x)) for _ in range(calls)]
            peer.autograd.backward(context, [torch.stack([y.sum() for y in ys]).sum()])
            gradient: torch.Tensor = peer.autograd.get_gradients(context)[x]
            return gradient

    assert torch.equal(step(), torch.full_like(x, 2.0 * calls))
    return step


def _take(make: Callable[[], Sized], peer: TorchContender) -> Callable[[], object]:
    values = make()
    assert peer.rpc.rpc_sync(peer.callee, take, args=(values,)) == len(values)
    return lambda: peer.rpc.rpc_sync(peer.callee, take, args=(values,))


def _list_of_200() -> list[torch.Tensor]:
    return [torch.randn(256) for _ in range(200)]


def _dict_of_40() -> dict[str, torch.Tensor]:
    return {f"layer{number}": torch.randn(5000) for number in range(40)}


def _state() -> dict[str, torch.Tensor]:
    return {f"p{number}": torch.randn(shape) for number, shape in enumerate(RESNET18)}


def _pull_state(peer: TorchContender) -> Callable[[], object]:
    def pull() -> None:  # the result is dropped before the next call
        peer.rpc.rpc_sync(peer.callee, give_state, args=(RESNET18,))

    return pull


def _give(peer: TorchContender) -> Callable[[], object]:
    def call() -> None:  # the result is dropped before the next call
        peer.rpc.rpc_sync(peer.callee, give, args=(GIVEN_NBYTES,))

    return call


def _bounce(peer: TorchContender) -> Callable[[], object]:
    own, depth = peer.rpc.get_worker_info().name, 4
    assert bounce(peer.rpc.__name__, own, peer.callee, depth) == depth
    return partial(bounce, peer.rpc.__name__, own, peer.callee, depth)


def _callers(peer: TorchContender) -> Callable[[], object]:
    def calls() -> None:
        for _ in range(CALLS_EACH):
            peer.rpc.rpc_sync(peer.callee, noop)

    def all_callers() -> None:
        threads = [threading.Thread(target=calls) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return all_callers


def _server_step(peer: TorchContender) -> Callable[[], object]:
    server = peer.rpc.remote(peer.callee, Model, args=(MODEL_NUMEL,))
    gradient = torch.randn(MODEL_NUMEL)

    def step() -> None:
        server.rpc_sync().push(gradient)
        server.rpc_sync().pull()

    return step


def _row(
    key: str,
    label: str,
    unit: str,
    prepare: Callable[[TorchContender], Callable[[], object]],
    calls: int,
    work: float = 1,
) -> Row:
    return Row(key, label, unit, prepare, calls, work, torch_only=True)


TORCH_ROWS = [
    _row("add", "torch.add, 64 B", "µs", _add, 1500),
    _row("remote_to_here", "remote and to_here", "µs", _remote_to_here, 800),
    _row("autograd_4", "autograd step, 4 floats", "µs", partial(_autograd_step, 4), 400),
    _row("autograd_1MB", "autograd step, 1 MB", "µs", partial(_autograd_step, 1 << 18), 200),
    _row("autograd_6_calls", "autograd step through 6 calls", "µs", partial(_autograd_of_calls, 6), 100),
    _row("tensors_200", "send 200 tensors of 1 KB", "µs", partial(_take, _list_of_200), 100),
    _row("tensors_40", "send 40 tensors of 20 KB", "µs", partial(_take, _dict_of_40), 150),
    _row("resnet18_push", "send a ResNet-18 (44 MB)", "µs", partial(_take, _state), 25),
    _row("resnet18_pull", "fetch a ResNet-18, freshly made", "µs", _pull_state, 25),
    _row("objects_300", "send 300 dicts", "µs", partial(_take, lambda: OBJECTS), 200),
    _row("bounce_depth4", "4 nested calls, to and fro", "µs", _bounce, 200),
    _row("callers4", f"no-ops, {CALLERS} threads", "calls/s", _callers, 4, work=CALLERS * CALLS_EACH),
    _row("give_32MB", "fetch 32 MB, freshly made", "GB/s", _give, 20, work=GIVEN_NBYTES / GB),
    _row("server_step_2MB", "push and pull 2 MB", "µs", _server_step, 100),
]
