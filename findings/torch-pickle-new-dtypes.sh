#!/usr/bin/env bash
# Tensors of the dtypes that have no typed storage cannot be pickled, though torch.save takes them.
#
# What one would guess: pickle.dumps takes a tensor of torch.uint16, as it takes one of torch.bfloat16, and as torch.save does.
# What happens: AttributeError from pickle.dumps for uint16, uint32, uint64, complex32 and the float8 dtypes.
# Versions: torch==2.13.0 numpy==2.4.6, CPython 3.11, Linux x86_64, CPU.
# Exit status: 0 while it is so; 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>&1 | { grep -v '^WARNING' || true; }
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import io
import pickle

import torch


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return str(torch.load(file).dtype)


def pickled(tensor):
    try:
        return str(pickle.loads(pickle.dumps(tensor)).dtype)
    except AttributeError as error:
        return f"AttributeError: {error}"


seen = {}
for dtype in (torch.bfloat16, torch.uint16, torch.uint32, torch.float8_e4m3fn):
    tensor = torch.zeros(4, dtype=dtype)
    seen[str(dtype)] = (saved(tensor), pickled(tensor))
refused = "AttributeError: type object 'torch.storage.UntypedStorage' has no attribute 'dtype'"
expected = {
    "torch.bfloat16": ("torch.bfloat16", "torch.bfloat16"),
    "torch.uint16": ("torch.uint16", refused),
    "torch.uint32": ("torch.uint32", refused),
    "torch.float8_e4m3fn": ("torch.float8_e4m3fn", refused),
}

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
