"""Twenty seconds of `make chaos`: workers, their broker and their network fail while they call each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.harness import free_port

SECONDS = 20
SEED = 11
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["file", "broker"])
def test_no_call_is_lost_or_run_twice(mode: str) -> None:
    """Each call is answered or fails, runs once at most, and nothing is kept of any in the end."""
    command = [sys.executable, "-m", "tests.chaos.run", "--mode", mode, "--seconds", str(SECONDS), "--seed", str(SEED)]
    done = subprocess.run(
        [*command, "--port", str(free_port())], capture_output=True, text=True, check=False, timeout=380, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
