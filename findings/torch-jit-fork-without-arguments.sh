#!/usr/bin/env bash
# torch.jit.fork(f) of a function without arguments does not compile in TorchScript.
#
# What one would guess: it starts f, as torch.jit.fork(f) does outside of compiled code, and as torch.jit.fork(f, x) does inside.
# What happens: RuntimeError: INTERNAL ASSERT FAILED in inline_forked_closures.cpp while the caller is compiled.
# Versions: torch==2.13.0 numpy==2.4.6, CPython 3.11, Linux x86_64, CPU.
# Exit status: 0 while it is so; 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>&1 | { grep -v '^WARNING' || true; }
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import sys

with open("forks.py", "w") as file:
    file.write(
        """
import torch


@torch.jit.script
def ones() -> torch.Tensor:
    return torch.ones(1)


@torch.jit.script
def ones_of(n: int) -> torch.Tensor:
    return torch.ones(n)


def without():
    return torch.jit.wait(torch.jit.fork(ones))


def with_one(n: int):
    return torch.jit.wait(torch.jit.fork(ones_of, n))
"""
    )
sys.path.insert(0, os.getcwd())
import forks
import torch

try:
    torch.jit.script(forks.without)
    without = "compiled"
except RuntimeError as error:
    without = "INTERNAL ASSERT" if "INTERNAL ASSERT FAILED" in str(error) else str(error)
seen = {
    "eager": forks.without().tolist(),
    "compiled, one argument": torch.jit.script(forks.with_one)(1).tolist(),
    "compiled, no argument": without,
}
expected = {"eager": [1.0], "compiled, one argument": [1.0], "compiled, no argument": "INTERNAL ASSERT"}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
