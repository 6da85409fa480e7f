"""What stands in the tables of benchmarks/results."""

from __future__ import annotations

import pytest

from benchmarks.contender import CONTENDERS
from benchmarks.results import NOT_INSTALLED, Results
from benchmarks.rows import ROWS
from benchmarks.tables import TABLES, Table


@pytest.fixture
def results() -> Results:
    """Two rounds of two rows, one of them of a rate, with a contender that is not installed."""
    made = Results(["zrpc", "tensorpipe", "rpyc"], ["noop", "sink_1MB"], missing={"rpyc": NOT_INSTALLED})
    for ours, theirs in ((100.0, 300.0), (200.0, 200.0)):
        made.add("zrpc", "noop", ours)
        made.add("tensorpipe", "noop", theirs)
    made.add("zrpc", "sink_1MB", 4.0)
    made.add("tensorpipe", "sink_1MB", 2.0)
    return made


def cells(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "x |" in line]


def test_a_table_has_medians_and_the_median_of_the_rounds_ratios(results: Results) -> None:
    """Over 1 means that the first of a pair is better, whether less is better or more."""
    table = Table(("zrpc", "tensorpipe", ("zrpc", "tensorpipe"), "rpyc"))
    assert cells(table.markdown(results, "facts")) == [
        ["no-op round trip", "µs", "150", "250", "2.00x", "not installed"],
        ["sink 1 MB", "GB/s", "4", "2", "2.00x", "not installed"],
    ]


def test_a_table_shows_only_what_was_to_be_measured(results: Results) -> None:
    """Columns of other contenders, comparisons with them, and other rows are left out."""
    table = Table(("zrpc", "tensorpipe", ("zrpc", "tensorpipe"), "grpc", ("zrpc", "grpc")), torch_rows=True)
    assert {len(row) for row in cells(table.markdown(results, "facts"))} == {5}
    assert len(cells(table.markdown(results, "facts"))) == 2


def test_a_file_begins_with_what_it_depends_on(results: Results) -> None:
    """The command, the day, the machine and the versions."""
    assert TABLES["tensorpipe"].markdown(results, "facts").startswith("facts.\n\n| ")


def test_every_contender_and_every_row_stands_in_a_table() -> None:
    """None is measured to be shown nowhere."""
    assert {key for table in TABLES.values() for key in table.contenders} == set(CONTENDERS)
    assert {key for table in TABLES.values() for key in table.rows} == set(ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_compared_stands_beside_the_comparison(name: str) -> None:
    """Both sides of a ratio are columns of their own."""
    table = TABLES[name]
    compared = {key for column in table.columns if not isinstance(column, str) for key in column}
    assert compared <= set(table.contenders)
