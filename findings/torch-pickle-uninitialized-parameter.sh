#!/usr/bin/env bash
# UninitializedParameter and UninitializedBuffer forget their dtype in pickle.
#
# What one would guess: a lazy module that was made with dtype=torch.float64 is float64 after pickle, and when it is materialized.
# What happens: both come back as float32, the default dtype, without an error.
# Versions: torch==2.13.0 numpy==2.4.6, CPython 3.11, Linux x86_64, CPU.
# Exit status: 0 while it is so; 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>&1 | { grep -v '^WARNING' || true; }
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import pickle

import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

seen = {}
for cls in (UninitializedParameter, UninitializedBuffer):
    made = cls(dtype=torch.float64)
    seen[cls.__name__] = (str(made.dtype), str(pickle.loads(pickle.dumps(made)).dtype))
lazy = pickle.loads(pickle.dumps(torch.nn.LazyLinear(3, dtype=torch.float64)))
lazy(torch.ones(1, 2))
seen["LazyLinear(dtype=float64) after its first forward"] = str(lazy.weight.dtype)
expected = {
    "UninitializedParameter": ("torch.float64", "torch.float32"),
    "UninitializedBuffer": ("torch.float64", "torch.float32"),
    "LazyLinear(dtype=float64) after its first forward": "torch.float32",
}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
