#!/usr/bin/env bash
# A leaf of a Tensor subclass that requires grad is no leaf any more after pickle.
#
# What one would guess: a leaf stays a leaf, as a plain tensor and an nn.Parameter do, and backward() fills its .grad.
# What happens: it has a grad_fn (AliasBackward0); backward() leaves its .grad None, and an optimizer refuses it.
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


class Sub(torch.Tensor):
    pass


def looks(tensor):
    after = pickle.loads(pickle.dumps(tensor))
    (after * 2).sum().backward()
    return after.is_leaf, after.requires_grad, after.is_leaf and after.grad is not None


plain = torch.ones(3, requires_grad=True)
seen = {"Tensor": looks(plain), "Sub": looks(torch.ones(3).as_subclass(Sub).requires_grad_())}
expected = {"Tensor": (True, True, True), "Sub": (False, True, False)}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
