#!/usr/bin/env bash
# Compiled code must give an @torch.jit.ignore function all arguments, those with defaults too.
#
# What one would guess: defaults of the Python function count, as those of a scripted function do.
# What happens: RuntimeError when the caller is compiled: Argument k not provided.
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

with open("defaults.py", "w") as file:
    file.write(
        """
import torch


@torch.jit.ignore
def ignored(x: torch.Tensor, k: int = 3) -> torch.Tensor:
    return x * k


def scripted(x: torch.Tensor, k: int = 3) -> torch.Tensor:
    return x * k


def calls_ignored(x: torch.Tensor):
    return ignored(x)


def calls_scripted(x: torch.Tensor):
    return scripted(x)
"""
    )
sys.path.insert(0, os.getcwd())
import defaults
import torch

try:
    torch.jit.script(defaults.calls_ignored)
    ignored = "compiled"
except RuntimeError as error:
    ignored = "Argument k not provided" if "Argument k not provided" in str(error) else str(error)
seen = {"scripted": torch.jit.script(defaults.calls_scripted)(torch.ones(1)).tolist(), "ignored": ignored}
expected = {"scripted": [3.0], "ignored": "Argument k not provided"}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
