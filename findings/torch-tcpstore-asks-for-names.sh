#!/usr/bin/env bash
# torch: TCPStore at a literal 127.0.0.1 asks the name server for a name, and waits for the answer.
#
# Versions: torch 2.13.0 (CPU build), CPython 3.11, glibc on Linux.
# Expected: `TCPStore("127.0.0.1", port, ...)` needs no name server, as `socket.create_connection(("127.0.0.1", port))`
#           needs none: the address is given, and 127.0.0.1 is in /etc/hosts besides.
# Seen:     the client asks for the name of the address that it connects to, and the server for that of each connection
#           that it accepts, only to be able to log them. The sockets are IPv6, so the address is ::ffff:127.0.0.1, which
#           the line of /etc/hosts for 127.0.0.1 does not answer: the question goes to the name server. Where that does
#           not answer, the constructor waits for the resolver's whole time limit (10 s by default, here 3).
# Why here: workers that meet in torch's store start late on a host whose name server is out of reach.
#           zrpc/membership/store_client.py, name_service.py.
# Needs:    unshare(1), and user namespaces or root: it makes a network of its own with a name server that is silent.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>&1 | { grep -v '^WARNING' || true; }
printf 'nameserver 127.0.0.1\noptions timeout:3 attempts:1\n' >"$folder/resolv.conf"
printf '127.0.0.1 localhost\n::1 localhost\n' >"$folder/hosts"
cat >"$folder/show.py" <<'PY'
import fcntl
import socket
import struct
import sys
import time

SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:  # the loopback interface of this network is down at first
    fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))
silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
silent.bind(("127.0.0.1", 53))
silent.setblocking(False)


def questions():
    """The names that were asked for since the last look."""
    asked = []
    while True:
        try:
            message = silent.recv(1024)
        except BlockingIOError:
            return asked
        labels, at = [], 12
        while message[at]:
            labels.append(message[at + 1 : at + 1 + message[at]].decode())
            at += 1 + message[at]
        asked.append(".".join(labels))


with socket.create_server(("127.0.0.1", 29776)), socket.create_connection(("127.0.0.1", 29776)):
    print("a plain connection asks for", questions())
from torch.distributed import TCPStore  # noqa: E402

began = time.monotonic()
store = TCPStore("127.0.0.1", 29777, None, is_master=True, wait_for_workers=False)
took = time.monotonic() - began
asked = questions()
print("TCPStore asks for", sorted(set(asked)), "and waits" if took >= 3 else "and does not wait")
sys.exit(0 if asked and took >= 3 else 1)
PY
cd "$folder"
unshare --map-root-user --mount --net sh -c \
  'mount --bind resolv.conf /etc/resolv.conf && mount --bind hosts /etc/hosts && exec venv/bin/python show.py' 2>&1 | { grep -v 'c10d\|Warning\|warn' || true; }
exit "${PIPESTATUS[0]}"
