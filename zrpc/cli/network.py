"""What `zrpc doctor` finds of the network: names, interfaces, ports and the places where groups meet."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from zrpc.cli.findings import Finding, Level, fail, ok, warn
from zrpc.config import BROKER_SCHEME, broker_addresses
from zrpc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOK_UP_S = 2.0
CONNECT_S = 1.0


def host_name() -> Iterator[Finding]:
    """Whether this host knows its own name: torch and gethostbyname ask for it."""
    name = socket.gethostname()
    found: list[str] = []
    failed: list[str] = []

    def look() -> None:
        try:
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        except OSError as error:
            failed.append(str(error))

    began = time.monotonic()
    thread = threading.Thread(target=look, name="zrpc-doctor", daemon=True)
    thread.start()
    thread.join(LOOK_UP_S)
    took_s = time.monotonic() - began
    if found:
        text = f"{name} is {', '.join(dict.fromkeys(found))}"
        if took_s < LOOK_UP_S / 2:
            yield ok("host name", text)
        else:
            yield warn("host name", f"{text}, after {took_s:.1f} s", _HOSTS.format(name=name))
    elif failed:
        yield warn("host name", f"{name} cannot be looked up: {failed[0]}", _HOSTS.format(name=name))
    else:
        yield warn("host name", f"the look-up of {name} takes more than {LOOK_UP_S:g} s", _HOSTS.format(name=name))


_HOSTS = "add a line with its address and {name} to /etc/hosts: starts wait for the name server otherwise"


def interfaces() -> Iterator[Finding]:
    """Whether this host can talk to itself, and to others."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), CONNECT_S).close()
    except OSError as error:
        yield fail("loopback", f"127.0.0.1 cannot be used: {error}", "bring the interface lo up: ip link set lo up")
    else:
        yield ok("loopback", "127.0.0.1 can be listened on and connected to")
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet is sent: this only chooses a route
            own = str(probe.getsockname()[0])
        except OSError:
            own = ""
    if own:
        yield ok("network", f"other hosts reach this one at {own} (interfaces: {', '.join(names) or 'none'})")
    else:
        yield warn(
            "network", f"there is no route to other hosts (interfaces: {', '.join(names) or 'lo alone'})",
            "workers of this host alone can meet; else bring an interface up",
        )  # fmt: skip


def ports() -> Iterator[Finding]:
    """Where workers are to listen and to meet, as the environment says."""
    if bind := os.environ.get("ZRPC_BIND"):
        yield _bindable("ZRPC_BIND", bind)
    if method := os.environ.get("ZRPC_INIT_METHOD"):
        yield from meeting_point(method)
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        yield from meeting_point(f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return
    if last - first < 2000:
        yield warn("ports", f"the system gives {last - first + 1} ports only", "sysctl net.ipv4.ip_local_port_range")
    else:
        yield ok("ports", f"the system gives {first} to {last}")


def _bindable(about: str, address: str) -> Finding:
    url = urlparse(address)
    try:
        if url.scheme != "tcp" or url.hostname is None or url.port is None:
            raise ValueError
        host = url.hostname if url.hostname != "*" else "0.0.0.0"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, url.port), family=family) as server:
            return ok(about, f"{address} can be listened on (port {server.getsockname()[1]})")
    except ValueError:
        return fail(about, f"{address!r} is no address", "give tcp://HOST:PORT; port 0 takes any free one")
    except OSError as error:
        return fail(about, f"{address} cannot be listened on: {os.strerror(error.errno or 0)}",
                     "give an address of this host, and a port that is free (0: any)")  # fmt: skip


def meeting_point(init_method: str) -> Iterator[Finding]:
    """Whether there is something at the place where a group is to meet."""
    url = urlparse(init_method)
    if init_method.startswith(BROKER_SCHEME):
        try:
            places = [urlparse(one) for one in broker_addresses(init_method)]
        except ConfigError as error:
            yield fail("meeting point", str(error), "give broker://HOST:PORT")
            return
        for place in places:
            yield _connectable(place.hostname, place.port, "start it: zrpc broker --bind tcp://HOST:PORT", "FAIL")
    elif url.scheme == "tcp":
        todo = "it is opened by rank 0 when it starts; else check the address, and the firewall"
        yield _connectable(url.hostname, url.port, todo, "WARN")
    elif url.scheme == "file":
        folder = Path(url.path).parent
        if not os.access(folder, os.W_OK | os.X_OK):
            yield fail("meeting point", f"{folder} is not there, or cannot be written to", "make it, for this user")
        else:
            yield ok("meeting point", f"{folder} can be written to; all workers must see the same file there")


def _connectable(host: str | None, port: int | None, todo: str, level: str) -> Finding:
    where = f"{host}:{port}"
    try:
        socket.create_connection((host or "", port or 0), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        text = f"nothing can be reached at {where}: {getattr(error, 'strerror', None) or error or 'no answer'}"
        return Finding("meeting point", Level[level], text, todo)
    return ok("meeting point", f"something listens at {where}")
