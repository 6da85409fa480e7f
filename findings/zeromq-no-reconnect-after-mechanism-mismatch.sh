#!/usr/bin/env bash
# ZeroMQ: a socket that meets a server with another security mechanism never connects again, and says nothing.
#
# Versions: pyzmq 27.3.0 (libzmq 4.3.5), CPython 3.11 on Linux.
# Expected: a socket that connects goes on trying until it is closed, as it does where nothing listens: once a server
#           that fits is at the address, what was sent arrives.
# Seen:     where the first server has CURVE and the client NULL, the client gives up for good. What it has sent, and
#           sends later, stays in its queue; only a monitor tells (EVENT_HANDSHAKE_FAILED_PROTOCOL).
# Why here: a worker that is started while its broker still has another configuration would wait for ever.
#           zrpc/transport/watch.py takes that event for a refusal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyzmq==27.3.0 2>&1 | { grep -v '^WARNING' || true; }
cat >"$folder/try.py" <<'PY'
import socket
import sys
import time

import zmq


def arrives(first_server_has_curve: bool) -> bool:
    """Whether a message of a NULL client reaches a NULL server that comes second at its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    context = zmq.Context()
    client, server = context.socket(zmq.DEALER), context.socket(zmq.ROUTER)
    server.curve_server = first_server_has_curve
    if first_server_has_curve:
        server.curve_secretkey = zmq.curve_keypair()[1]
        server.bind(address)
    client.reconnect_ivl = 100
    client.connect(address)
    client.send(b"hello")
    time.sleep(1)
    server.close(0)
    time.sleep(0.2)
    second = context.socket(zmq.ROUTER)
    second.bind(address)
    came = bool(second.poll(5000))
    context.destroy(0)
    return came


print("pyzmq", zmq.__version__, "libzmq", zmq.zmq_version())
refused, mismatched = arrives(False), arrives(True)
print("after a refused connection:", refused)
print("after another mechanism:", mismatched)
sys.exit((refused, mismatched) != (True, False))
PY
"$folder/venv/bin/python" "$folder/try.py"
