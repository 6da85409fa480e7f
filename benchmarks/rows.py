"""What is measured of every contender. A row's name, sizes and numbers of calls are those of one line of the table."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.row import GB, Row
from benchmarks.torch_rows import TORCH_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 256


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
    *TORCH_ROWS,
]

ROWS = {row.key: row for row in _ALL}
