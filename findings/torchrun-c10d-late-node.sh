#!/usr/bin/env bash
# torchrun (c10d rendezvous): a node that joins an elastic run after its first round never gets MASTER_ADDR, and fails.
#
# Versions: torch 2.13.0+cpu, CPython 3.11 on Linux.
# Expected: with `--nnodes 2:3` two nodes begin, a third may come later, and the next round has all three: every node is told
#           the address of rank 0.
# Seen:     rank 0 of the next round still has the address that it published in the round before, and does not publish it
#           under the key of this one, which is where the newcomer looks. The two return at once as members of a world of
#           three; the newcomer raises DistStoreError, "wait timeout", for .../MASTER_ADDR. With
#           TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 all three meet.
# Why here: elastic groups of RPC workers grow and shrink by such rounds; whoever relies on a late node must set that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>&1 | { grep -v '^WARNING' || true; }
cat >"$folder/try.py" <<'PY'
"""Three nodes of one elastic run: two meet, the third comes, and all meet again, as torchrun's agents do then."""
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import torch.distributed.elastic.rendezvous.registry as registry
from torch.distributed.elastic.rendezvous import RendezvousParameters

with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    endpoint = f"127.0.0.1:{sock.getsockname()[1]}"


def node(is_host: bool):
    return registry.get_rendezvous_handler(
        RendezvousParameters(
            "c10d", endpoint, "a-run", 2, 3, local_addr="127.0.0.1", is_host=is_host, read_timeout=5, last_call_timeout=2
        )
    )


def outcome(handler) -> str:
    try:
        info = handler.next_rendezvous()
        return f"rank {info.rank} of {info.world_size}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


first, second, third = node(True), node(False), node(False)
with ThreadPoolExecutor(3) as pool:
    print("two nodes:", sorted(pool.map(outcome, [first, second])))
    late = pool.submit(outcome, third)
    while not first.num_nodes_waiting():  # what an agent looks at, to begin the next round
        threading.Event().wait(0.1)
    print("and a third:", sorted([*pool.map(outcome, [first, second]), late.result()]))
os._exit(0)
PY
seen=$(timeout 120 "$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
unshared=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 timeout 120 "$folder/venv/bin/python" "$folder/try.py" 2>/dev/null)
echo "$seen"
echo "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1:"
echo "$unshared"
if grep -q "and a third: .*DistStoreError: wait timeout after 5000ms, keys: /torch.rendezvous.a-run.1/MASTER_ADDR.*rank 0 of 3.*rank 1 of 3" <<<"$seen" &&
    grep -q "and a third: .*rank 0 of 3.*rank 1 of 3.*rank 2 of 3" <<<"$unshared"; then
    echo "as described"
else
    echo "it has changed"
    exit 1
fi
