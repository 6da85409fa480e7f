#!/usr/bin/env bash
# torch.futures.wait_all does not exit early for an error that was set with Future.set_exception.
#
# What one would guess: its documentation: if any of the futures encounters an error, it exits early and does not wait for the others.
# What happens: an error set from Python is a value to C++, so wait_all waits for the slowest future and raises then.
# Versions: torch==2.13.0 numpy==2.4.6, CPython 3.11, Linux x86_64, CPU.
# Exit status: 0 while it is so; 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>&1 | { grep -v '^WARNING' || true; }
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import threading

import torch

failed, slow = torch.futures.Future(), torch.futures.Future()
failed.set_exception(ValueError("at once"))
timer = threading.Timer(1.0, slow.set_result, args=(1,))
timer.start()
try:
    torch.futures.wait_all([failed, slow])
except ValueError:
    seen = "raised when the slow future was done" if slow.done() else "raised at once"
expected = "raised when the slow future was done"
timer.join()

print("seen:", seen)
assert seen == expected, f"this has changed: {expected} was seen before"
PYTHON
