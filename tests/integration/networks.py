"""Two networks of this machine, with a cable between them that can be cut: for tests of hosts that vanish."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_counter = itertools.count()


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


class Network:
    """A network of its own, for processes that are started in it.

    Attributes:
        here: the address of this process there.
        there: the address of those processes.
    """

    def __init__(self) -> None:
        count = next(_counter)
        self._name = f"zrpc{os.getpid()}-{count}"
        self._end = f"zr{os.getpid()}-{count}"
        number = os.getpid() * 8 + count
        first = number // 251 % 60 * 4
        self.here, self.there = (f"10.213.{number % 251}.{first + last}" for last in (1, 2))
        _ip("netns", "add", self._name)
        _ip("link", "add", self._end, "type", "veth", "peer", "name", "zr0", "netns", self._name)
        _ip("addr", "add", f"{self.here}/30", "dev", self._end)
        _ip("link", "set", self._end, "up")
        for command in (["addr", "add", f"{self.there}/30", "dev", "zr0"], ["link", "set", "zr0", "up"]):
            _ip("-n", self._name, *command)
        _ip("-n", self._name, "link", "set", "lo", "up")

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` there."""
        return ["ip", "netns", "exec", self._name, *command]

    def cut(self) -> None:
        """Nothing passes from now on, and no connection breaks."""
        _ip("link", "set", self._end, "down")

    def close(self) -> None:
        _ip("link", "del", self._end)
        _ip("netns", "del", self._name)


@contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.close()


def is_permitted() -> bool:
    """Whether this process may make networks."""
    if shutil.which("ip") is None:
        return False
    try:
        with network():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
