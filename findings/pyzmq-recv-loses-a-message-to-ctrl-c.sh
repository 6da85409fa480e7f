#!/usr/bin/env bash
# pyzmq: a `recv` that a signal handler interrupts may have taken a message off the socket, and loses it.
#
# Versions: pyzmq 27.3.0 (libzmq 4.3.5), CPython 3.11 on Linux.
# Expected: as with `socket.recv`, `os.read` and `queue.get`, an interrupted `recv` has received nothing, so that a
#           program that catches KeyboardInterrupt can call it again (pyzmq retries on EINTR, as PEP 475 asks).
# Seen:     after each call of libzmq, also one that succeeded, pyzmq looks for signals; what a handler raises there
#           replaces the message that has been received. Of a message of several parts the rest stays, and is read as
#           the beginning of the next one. `poll` loses nothing.
# Why here: a thread that waits for an answer reads a ZeroMQ socket, and Ctrl-C strikes there. zrpc/interrupts.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyzmq==27.3.0 2>&1 | { grep -v '^WARNING' || true; }
cat >"$folder/show.py" <<'PY'
import _thread
import functools
import operator
import socket
import sys
import threading
import time
from collections import deque

import zmq


def interrupted(receive, send):
    """Call `receive`, which waits; Ctrl-C comes, then what it waits for. What it returned, if it did."""

    def come():
        time.sleep(0.3)
        _thread.interrupt_main()
        send()

    thread = threading.Thread(target=come)
    thread.start()
    got = deque()
    try:
        got.extend(map(operator.call, [receive]))  # what is returned is kept before any bytecode runs
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    thread.join()
    return list(got)


a, b = socket.socketpair()
plain = interrupted(functools.partial(b.recv, 10), lambda: a.send(b"1"))
print("socket.recv gives", plain)

context = zmq.Context()
sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
receiver.bind("inproc://x")
sender.connect("inproc://x")
single = interrupted(receiver.recv, lambda: sender.send(b"1"))
left = receiver.poll(100)
print("pyzmq's recv gives", single, "and poll tells of", left, "messages")
parts = interrupted(receiver.recv, lambda: sender.send_multipart([b"address", b"content"]))
rest = receiver.recv_multipart()
print("of two parts, interrupted in the first, recv_multipart then gives", rest)
context.destroy(linger=0)
sys.exit(0 if (plain, single, left, parts, rest) == ([b"1"], [], 0, [], [b"content"]) else 1)
PY
"$folder/venv/bin/python" "$folder/show.py"
