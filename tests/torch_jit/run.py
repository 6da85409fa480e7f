#!/usr/bin/env python3
"""Run PyTorch's own TorchScript tests of RPC against zrpc, and say how many pass.

    python tests/torch_jit/run.py                       all 58
    python tests/torch_jit/run.py -k rref               any arguments of pytest
    JIT_SUITE_PEER=torch python tests/torch_jit/run.py  the same tests on TensorPipe: the reference

The last line is `torch JIT suite: P passed, F failed, S skipped of N`; the exit status is pytest's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)


class Count:
    """Counts outcomes as pytest reports them."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped += 1
        elif report.failed:
            self.failed += 1
            self.failures.append(report.nodeid.split("::", 1)[1])
        elif report.when == "call":
            self.passed += 1


def main() -> int:
    sys.path.insert(0, HERE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    count = Count()
    options = ["-q", "-p", "no:warnings", "-p", "no:cacheprovider", "--timeout", "60", "--tb", "short"]
    suite = str(Path(HERE) / "suite.py")
    status = pytest.main(["-c", os.devnull, "--rootdir", HERE, suite, *options, *sys.argv[1:]], plugins=[count])
    for name in count.failures:
        print("failed:", name)
    total = count.passed + count.failed + count.skipped
    print(f"torch JIT suite: {count.passed} passed, {count.failed} failed, {count.skipped} skipped of {total}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
