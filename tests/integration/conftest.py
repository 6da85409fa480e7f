"""Fixtures that run workers as real processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.harness import MODES, Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Workers in peer mode that meet over a file: `cluster.run(function, 2)`."""
    started = Cluster("file", tmp_path)
    yield started
    started.close()


@pytest.fixture(params=MODES)
def cluster_in_each_mode(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    """The same, once in each mode: peers over a file, peers over TCP, and with a broker."""
    started = Cluster(request.param, tmp_path)
    yield started
    started.close()
