#!/usr/bin/env bash
# A subclass of nn.Parameter is an nn.Parameter after pickle.
#
# What one would guess: its class is kept, as pickle keeps that of any Tensor subclass, and copy.deepcopy that of this one.
# What happens: pickle gives an exact nn.Parameter; copy.deepcopy keeps the class.
# Versions: torch==2.13.0 numpy==2.4.6, CPython 3.11, Linux x86_64, CPU.
# Exit status: 0 while it is so; 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>&1 | { grep -v '^WARNING' || true; }
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import pickle

import torch


class Scale(torch.nn.Parameter):
    pass


scale = Scale(torch.ones(2))
seen = {
    "deepcopy": type(copy.deepcopy(scale)).__name__,
    "pickle": type(pickle.loads(pickle.dumps(scale))).__name__,
}
expected = {"deepcopy": "Scale", "pickle": "Parameter"}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
