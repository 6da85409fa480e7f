"""What is measured of every contender. A row's name, sizes and numbers of calls are those of one line of the table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GB = 1 << 30
"""2^30 bytes."""
WINDOW = 256
QUICKER = 10
"""`--quick` makes so many times fewer calls."""
CALLS_MIN = 2
ROW_S = 3.0
"""A row takes no longer, as far as `CALLS_MIN` allows: some contenders need seconds for 256 MB."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: its name on the command line.
        label: its name in the table.
        unit: of its value: `µs` (less is better), `calls/s` or `GB/s` (more is).
        prepare: given a contender, checks that it gives the right answer and returns what is timed.
        calls: how often that is called in a round, at most.
        work: calls, or GB moved, in one call of it.
        torch_only: only for those who speak torch.distributed.rpc.
    """

    key: str
    label: str
    unit: str
    prepare: Callable[[Any], Callable[[], object]]
    calls: int
    work: float = 1.0
    torch_only: bool = False

    @property
    def less_is_better(self) -> bool:
        return self.unit == "µs"

    def count(self, one_s: float, quick: bool) -> int:
        """How many calls are timed, where the first took `one_s` seconds."""
        calls = self.calls // QUICKER if quick else self.calls
        return max(CALLS_MIN, min(calls, int(ROW_S / one_s)))

    def value(self, stats: Mapping[str, float]) -> float:
        """The row's value, from the seconds that the calls took: a median for a time, a mean for a rate."""
        return stats["median"] * 1e6 if self.less_is_better else self.work / stats["mean"]


def _noop(peer: Any) -> Callable[[], object]:
    return peer.noop  # type: ignore[no-any-return]


def _noops(peer: Any) -> Callable[[], object]:
    return partial(peer.noops, WINDOW)


def _echo(x: torch.Tensor, peer: Any) -> Callable[[], object]:
    assert torch.equal(peer.echo(x), x)
    return partial(peer.echo, x)


def _sink(nbytes: int, peer: Any) -> Callable[[], object]:
    return partial(peer.sink, _random(nbytes))


def _big_echo(nbytes: int, peer: Any) -> Callable[[], object]:
    return _echo(_random(nbytes), peer)


def _add(peer: Any) -> Callable[[], object]:
    x = torch.ones(16)
    assert torch.equal(peer.add(x), x + 1)
    return partial(peer.add, x)


def _remote_to_here(peer: Any) -> Callable[[], object]:
    return peer.remote_to_here  # type: ignore[no-any-return]


def _autograd_step(numel: int, peer: Any) -> Callable[[], object]:
    x = torch.ones(numel, requires_grad=True)
    assert torch.equal(peer.autograd_step(x), torch.full_like(x, 2))
    return partial(peer.autograd_step, x)


def _random(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8)


def _sinks() -> list[Row]:
    calls = {1: 200, 16: 64, 256: 4}
    return [
        Row(f"sink_{mb}MB", f"sink {mb} MB", "GB/s", partial(_sink, mb << 20), count, work=(mb << 20) / GB)
        for mb, count in calls.items()
    ]


_ALL = [
    Row("noop", "no-op round trip", "µs", _noop, 2000),
    Row("echo_64B", "echo 64 B", "µs", partial(_echo, torch.ones(16)), 1500),
    Row("noops", f"no-ops, {WINDOW} under way", "calls/s", _noops, 40, work=WINDOW),
    *_sinks(),
    Row("echo_16MB", "echo 16 MB", "GB/s", partial(_big_echo, 16 << 20), 30, work=2 * (16 << 20) / GB),
    Row("add", "torch.add, 64 B", "µs", _add, 1500, torch_only=True),
    Row("remote_to_here", "remote and to_here", "µs", _remote_to_here, 800, torch_only=True),
    Row("autograd_4", "autograd step, 4 floats", "µs", partial(_autograd_step, 4), 400, torch_only=True),
    Row("autograd_1MB", "autograd step, 1 MB", "µs", partial(_autograd_step, 1 << 18), 200, torch_only=True),
]

ROWS = {row.key: row for row in _ALL}
