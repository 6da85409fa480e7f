"""One row of one contender, timed by pytest-benchmark: `python -m pytest -c benchmarks/pytest.ini --contender grpc`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from benchmarks.contender import Contender
    from benchmarks.row import Row


def bench_row(benchmark: Any, contender: Contender, row: Row, pytestconfig: pytest.Config) -> None:
    """What it gives is the row's value: seconds are turned into it by `Row.value`."""
    quick = pytestconfig.getoption("quick")
    call = row.prepare(contender)
    began = time.perf_counter()
    call()
    calls = row.count(time.perf_counter() - began, quick)
    benchmark.extra_info["row"] = row.key
    benchmark.pedantic(call, rounds=calls, warmup_rounds=calls // 10, iterations=1)
