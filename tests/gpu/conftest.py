"""Tests that need a CUDA device: `make gpu`. They run in worker processes; this one never uses the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import cluster

__all__ = ["cluster"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder are GPU tests, and may take a while."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(300))
