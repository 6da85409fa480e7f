"""The example that trains on handwritten digits, as a user runs it: by the launch scripts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def train(script: str, workers: int, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), "-n", str(workers), "examples/digits/train.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("script", "workers"), [("zrpc-cluster", 3), ("zrpc-peers", 3)])
def test_it_reaches_the_accuracy_and_draws_the_curves(script: str, workers: int, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "curves.png"
    done = train(script, workers, "--picture", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"final test accuracy: ([\d.]+)%", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) >= 95.0
    assert str(picture) in done.stdout
    assert picture.read_bytes().startswith(PNG)
    assert "100%" in done.stdout + done.stderr  # the progress bar came to its end


@pytest.mark.parametrize("allow", ["registered", "any"])
def test_too_little_training_is_a_failure(allow: str, tmp_path: Path) -> None:
    """In either mode: where nothing is pickled, and as with torch."""
    few = ("--epochs", "1", "--batch-size", "720", "--picture", str(tmp_path / "curves.png"))
    done = train("zrpc-peers", 2, "--allow", allow, *few)
    assert done.returncode == 1
    assert "should reach 95%" in done.stdout + done.stderr


def test_it_says_what_it_needs() -> None:
    command = [sys.executable, str(ROOT / "examples/digits/train.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={})
    assert done.returncode == 2
    assert "start this with a launcher" in done.stderr
