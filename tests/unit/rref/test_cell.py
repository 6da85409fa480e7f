"""The owner's place for a value."""

from __future__ import annotations

import pytest

from zrpc.errors import RemoteError
from zrpc.rref.cell import Cell


def test_the_traceback_of_an_error_does_not_grow_with_those_who_ask() -> None:
    cell = Cell()
    cell.set_error(ValueError("x"))
    lengths = set()
    for _ in range(50):
        with pytest.raises(ValueError, match="x") as caught:
            cell.get()
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1


def test_what_would_end_a_thread_that_asks_is_told_as_an_error() -> None:
    cell = Cell()
    cell.set_error(SystemExit(3))
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        cell.get()
