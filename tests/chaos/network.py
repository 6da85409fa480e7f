"""Hosts that are network namespaces on one bridge, where this process may make some. Their links can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

VARIABLE = "CHAOS_IN_NAMESPACE"
BRIDGE = "10.77.0.254"


def enter() -> bool:
    """Run this program again in a network of its own, with a bridge. Returns there, or where that is not permitted.

    Returns:
        Whether this is such a network.
    """
    if os.environ.get(VARIABLE):
        for command in (
            "link set lo up",
            "link add br0 type bridge",
            f"addr add {BRIDGE}/24 dev br0",
            "link set br0 up",
        ):
            ip(command)
        return True
    tools = [shutil.which(name) for name in ("unshare", "nsenter", "ip")]
    if None in tools or not _is_permitted():
        return False
    os.environ[VARIABLE] = "1"
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    os.execvp("unshare", ["unshare", "-rn", sys.executable, "-m", spec.name, *sys.argv[1:]])


def _is_permitted() -> bool:
    commands = "ip link set lo up && ip link add v0 type veth peer name v1 && ip link add b0 type bridge"
    return subprocess.run(["unshare", "-rn", "sh", "-c", commands], capture_output=True, check=False).returncode == 0


def ip(command: str) -> None:
    """Run `ip` in this network."""
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def address(number: int) -> str:
    """Of host `number`."""
    return f"10.77.0.{number + 1}"


def plug(number: int, pid: int) -> None:
    """Give the process `pid`, which has a network of its own, the link of host `number`."""
    subprocess.run(["ip", "link", "del", f"v{number}"], check=False, capture_output=True)
    ip(f"link add v{number} type veth peer name eth0 netns {pid}")
    ip(f"link set v{number} master br0 up")
    inside = ["nsenter", "-t", str(pid), "-n", "ip"]
    for command in (f"addr add {address(number)}/24 dev eth0", "link set lo up", "link set eth0 up"):
        subprocess.run([*inside, *command.split()], check=True, capture_output=True)


def cut(number: int, *, is_cut: bool) -> None:
    """Cut the link of host `number`, or mend it. What is sent meanwhile is swallowed: nothing says that it is cut."""
    subprocess.run(["ip", "link", "set", f"v{number}", "down" if is_cut else "up"], check=False, capture_output=True)
