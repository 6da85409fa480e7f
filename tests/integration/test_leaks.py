"""What worker processes leave behind after their shutdown fails a test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.integration.harness import WorkersFailedError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster


def leave_a_memory_file(rank: int) -> None:
    if rank == 1:
        os.memfd_create("zrpc-slab")


def test_what_a_worker_has_open_after_shutdown_fails_the_test(cluster: Cluster) -> None:
    """The harness says which worker it was, and what it has left."""
    with pytest.raises(WorkersFailedError, match=r"left behind: file descriptor \d+ \(/memfd:zrpc-slab") as failed:
        cluster.run(leave_a_memory_file)
    assert [outcome.rank for outcome in failed.value.outcomes if outcome.error is not None] == [1]
