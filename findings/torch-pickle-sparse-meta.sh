#!/usr/bin/env bash
# A sparse tensor on the meta device comes out of pickle as a dense one.
#
# What one would guess: layout is kept, as it is for sparse tensors on the CPU.
# What happens: torch.sparse_coo becomes torch.strided, without an error.
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

sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (3,))
seen = {}
for device in ("cpu", "meta"):
    before = sparse.to(device)
    seen[device] = (str(before.layout), str(pickle.loads(pickle.dumps(before)).layout))
expected = {"cpu": ("torch.sparse_coo", "torch.sparse_coo"), "meta": ("torch.sparse_coo", "torch.strided")}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
