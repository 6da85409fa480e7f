"""Options and fixtures of the benchmarks. One run of pytest measures one contender, in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.contender import CONTENDERS
from benchmarks.rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.contender import Contender


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contenders")
    group.addoption("--contender", choices=list(CONTENDERS), default="zrpc", help="which framework (zrpc)")
    group.addoption("--rows", default=",".join(ROWS), help="which rows, with commas between (all)")
    group.addoption("--quick", action="store_true", help="a tenth of the calls")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        speaks_torch = CONTENDERS[metafunc.config.getoption("contender")].speaks_torch
        wanted = [ROWS[key] for key in metafunc.config.getoption("rows").split(",")]
        offered = [row for row in wanted if speaks_torch or not row.torch_only]
        metafunc.parametrize("row", offered, ids=[row.key for row in offered])


@pytest.fixture(scope="session")
def contender(pytestconfig: pytest.Config) -> Iterator[Contender]:
    """The contender, connected."""
    made = CONTENDERS[pytestconfig.getoption("contender")].make()
    made.start()
    yield made
    made.stop()
