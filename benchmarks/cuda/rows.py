"""What is measured on devices: one function a row, run by worker w0 with its peer w1 at hand.

`_us` rows are medians of single calls (lower is better), `_GBps` rows are rates and `_share` rows parts of 1 (higher is
better). `LOCAL` rows need no peer: what the machine itself can do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda:0"
SIZES_MB = (1, 16, 256)
MB = 1 << 20
TRAFFIC_MB = 2048
"""About so much is sent for one rate."""

Row = Callable[[Any, Any], float]
"""`row(rpc, autograd)`: the modules of the framework that is measured."""


def sink(x: torch.Tensor) -> None:
    """On the callee: take `x`, and answer when it is there."""
    torch.cuda.current_stream(x.device).synchronize()


def echo(x: torch.Tensor) -> torch.Tensor:
    """On the callee: give `x` back."""
    return x


def _random(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=DEVICE)


def _rate(call: Callable[[], object], nbytes: int) -> float:
    """GB/s of a call that moves `nbytes`."""
    count = max(4, min(200, TRAFFIC_MB * MB // nbytes))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return count * nbytes / (time.perf_counter() - begun) / 1e9


def _median_us(call: Callable[[], object], count: int, warm: int = 20) -> float:
    for _ in range(warm):
        call()
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def _sink(megabytes: int) -> Row:
    def row(rpc: Any, autograd: Any) -> float:
        del autograd
        x = _random(megabytes * MB)
        return _rate(lambda: rpc.rpc_sync("w1", sink, args=(x,)), x.nbytes)

    return row


def _echo(megabytes: int) -> Row:
    def row(rpc: Any, autograd: Any) -> float:
        del autograd
        x = _random(megabytes * MB)
        assert torch.equal(rpc.rpc_sync("w1", echo, args=(x,)), x)
        return _rate(lambda: rpc.rpc_sync("w1", echo, args=(x,)), 2 * x.nbytes)

    return row


def _echo_small(rpc: Any, autograd: Any) -> float:
    del autograd
    x = torch.ones(16, device=DEVICE)
    return _median_us(lambda: rpc.rpc_sync("w1", echo, args=(x,)), 500)


def _autograd_step(numel: int, count: int) -> Row:
    def row(rpc: Any, autograd: Any) -> float:
        x = torch.ones(numel, device=DEVICE, requires_grad=True)

        def step() -> torch.Tensor:
            with autograd.context() as context_id:
                y = rpc.rpc_sync("w1", torch.add, args=(x, x))
                autograd.backward(context_id, [y.sum()])
                gradient: torch.Tensor = autograd.get_gradients(context_id)[x]
                return gradient

        assert torch.equal(step(), torch.full_like(x, 2.0))
        return _median_us(step, count)

    return row


def _async_return(rpc: Any, autograd: Any) -> float:
    """How long `rpc_async` with a large tensor holds up its caller, while a kernel before it still runs."""
    del autograd
    x = _random(64 * MB)
    rpc.rpc_sync("w1", sink, args=(x,))
    times = []
    for _ in range(10):
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        begun = time.perf_counter()
        future = rpc.rpc_async("w1", sink, args=(x,))
        times.append(time.perf_counter() - begun)
        future.wait()
    return statistics.median(times) * 1e6


def _overlap(rpc: Any, autograd: Any) -> float:
    """Of the shorter of a computation and a transfer, the part that runs at the time of the other; by events."""
    del autograd
    x, a = _random(256 * MB), torch.randn(4096, 4096, device=DEVICE)

    def compute() -> None:
        for _ in range(60):
            torch.mm(a, a)

    def send() -> Any:
        return rpc.rpc_async("w1", sink, args=(x,))

    def elapsed_ms(*steps: Callable[[], Any]) -> float:
        make_event: Any = torch.cuda.Event
        begin, end = make_event(enable_timing=True), make_event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for started in [step() for step in steps]:
            if started is not None:
                started.wait()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    elapsed_ms(send, compute)
    alone = [statistics.median(elapsed_ms(step) for _ in range(5)) for step in (send, compute)]
    both = statistics.median(elapsed_ms(send, compute) for _ in range(5))
    return max(0.0, min(1.0, (sum(alone) - both) / min(alone)))


ROWS: dict[str, Row] = {
    **{f"sink_{megabytes}MB_GBps": _sink(megabytes) for megabytes in SIZES_MB},
    **{f"echo_{megabytes}MB_GBps": _echo(megabytes) for megabytes in SIZES_MB},
    "echo_64B_us": _echo_small,
    "autograd_step_us": _autograd_step(4, 200),
    "autograd_step_1MB_us": _autograd_step(1 << 18, 100),
    "async_return_us": _async_return,
    "overlap_share": _overlap,
}


def _copy_limit(megabytes: int, to_device: bool) -> Callable[[], float]:
    def row() -> float:
        pinned = torch.empty(megabytes * MB, dtype=torch.uint8, pin_memory=True)
        target, source = torch.empty_like(pinned, device=DEVICE), pinned
        if not to_device:
            target, source = source, target
        return _rate(lambda: target.copy_(source, non_blocking=True), pinned.nbytes)

    return row


LOCAL: dict[str, Callable[[], float]] = {
    **{f"pinned_to_device_{megabytes}MB_GBps": _copy_limit(megabytes, True) for megabytes in SIZES_MB},
    **{f"device_to_pinned_{megabytes}MB_GBps": _copy_limit(megabytes, False) for megabytes in SIZES_MB},
}
"""The pinned copy limit: what tensors that travel through the host cannot be faster than, each way."""
