#!/usr/bin/env bash
# torch: a PrefixStore around a Store written in Python does not keep that store alive; it then fails as "Not implemented".
#
# Versions: torch 2.13.0+cpu, CPython 3.11 on Linux.
# Expected: `PrefixStore("a", MyStore())` holds the store that it was given, as it does with torch's own stores: nothing
#           else needs to refer to it.
# Seen:     the C++ half of the Python store lives on, its Python half does not. The first call raises RuntimeError: an
#           INTERNAL ASSERT of c10d/init.cpp, "Not implemented", with the request to report a bug. While the program has
#           a name for the inner store, the same calls work.
# Why here: whoever wraps a store (to authenticate its records, say) hands prefixes of it around, and must keep it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>&1 | { grep -v '^WARNING' || true; }
cat >"$folder/try.py" <<'PY'
import gc
import sys

import torch.distributed as dist


class Wrapped(dist.Store):
    """A store in Python, around one of torch's."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self.inner = inner

    def set(self, key: str, value: str) -> None:
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        return self.inner.get(key)


def outcome(prefix: dist.PrefixStore) -> str:
    gc.collect()
    try:
        prefix.set("x", "1")
        return prefix.get("x").decode()
    except RuntimeError as error:
        return f"RuntimeError: {'INTERNAL ASSERT' in str(error)} {'Not implemented' in str(error)}"


kept = Wrapped(dist.HashStore())
seen = [
    ("torch's own store, without a name", outcome(dist.PrefixStore("a", dist.HashStore()))),
    ("a store in Python, with a name", outcome(dist.PrefixStore("a", kept))),
    ("a store in Python, without a name", outcome(dist.PrefixStore("a", Wrapped(dist.HashStore())))),
]
for what, got in seen:
    print(f"{what}: {got}")
sys.exit([got for _, got in seen] != ["1", "1", "RuntimeError: True True"])
PY
"$folder/venv/bin/python" "$folder/try.py"
echo "as described"
