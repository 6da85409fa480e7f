"""Making ZeroMQ sockets: the one place where their options are set.

Every socket gets linger 0 at its creation (an exit never waits for a peer that is gone), a bounded high-water mark and
a bounded message size. A connection that died silently is noticed by ZMTP heartbeats, which a process that stands still
does not answer, or by what the kernel says of it (`zrpc.transport.silence`), which does not mind that.
"""

from __future__ import annotations

import ctypes
import ipaddress
import itertools
import socket as pysocket
import struct
import warnings
from typing import TYPE_CHECKING, Any

import zmq

from zrpc.config import DEFAULT_LIVENESS_TIMEOUT_S
from zrpc.errors import ConfigError
from zrpc.transport import descriptors, silence

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.transport.credentials import Credentials

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 10_000
KEEPALIVES_BEYOND = 10
"""The kernel gives a silent connection up after so many probes more than this process does."""
UNACKNOWLEDGED_MAX_MS = 30_000
"""Where the system does not tell how long the other host's kernel has said nothing: so long it may, or take no data as
the process there does not read it."""
HIGH_WATER_MARK = 10_000
MAX_FRAME_NBYTES = 1 << 40
BACKLOG = 1024
RECONNECT_FIRST_MS = 50
RECONNECT_MAX_MS = 1_000
CONNECT_TIMEOUT_MS = 5_000
"""Of connections with heartbeats; of others it is the time that a host may be silent."""
HANDSHAKE_MAX_MS = 5_000
"""A connection that has not proved by then what it has to is closed."""
LOOPBACK_BUFFER_NBYTES = 512 << 10
"""What the kernel keeps of a loopback connection on the sender's side. By itself it lets this grow to some MiB, and
what the receiver copies has left the caches by then: large messages are 20 to 30 % slower. A network needs that much.
"""

MAX_SOCKETS = 8192

_MONITOR_EVENT = struct.Struct("=Hi")  # event, value
_monitor_numbers = itertools.count()


def make_context() -> Context:
    """A ZeroMQ context. Each endpoint has its own: its `term()` then waits for that endpoint's messages alone.

    Raises:
        LimitError: this process may not open the files that an endpoint needs.
    """
    descriptors.check_room(descriptors.PER_ENDPOINT)
    context: Context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def make_socket(
    context: Context, kind: int, identity: bytes | None = None, *, heartbeats: bool = True,
    liveness_s: float = DEFAULT_LIVENESS_TIMEOUT_S,
) -> Socket:  # fmt: skip
    """A socket of ZeroMQ type `kind` (such as `zmq.DEALER`) with the options that every socket here has.

    Args:
        context: whose it is.
        kind: its type.
        identity: its routing id.
        heartbeats: connections end where the other process stands still, and what lies unread in them is lost. Else
            the kernel probes an idle one every second, and it is for `ConnectionWatch` to see that the other host's
            kernel is silent.
        liveness_s: how long a host may be silent, without heartbeats.

    Raises:
        LimitError: this process may not open the files that the socket, its monitor and its connection need.
    """
    descriptors.check_room(descriptors.PER_PEER)
    sock: Socket = context.socket(kind)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    sock.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_NBYTES)
    sock.setsockopt(zmq.BACKLOG, BACKLOG)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MAX_MS)
    if heartbeats:
        sock.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
    else:
        sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
        sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, silence.KEEPALIVE_S)
        sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, silence.KEEPALIVE_S)
        sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, int(liveness_s) + KEEPALIVES_BEYOND)
        if not silence.IS_KNOWN:
            sock.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MAX_MS)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, int(liveness_s * 1000))
    sock.setsockopt(zmq.RECONNECT_IVL, RECONNECT_FIRST_MS)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    if identity is not None:
        sock.setsockopt(zmq.ROUTING_ID, identity)
    if kind == zmq.ROUTER:
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return sock


def make_monitor(context: Context, sock: Socket, events: int) -> Socket:
    """The socket on which ZeroMQ tells of `events` of `sock`; the caller closes it.

    Each has an address of its own. pyzmq's `get_monitor_socket` names it after the file descriptor of `sock`, and one
    that was closed a moment ago may still stand under that name: the monitor then fails with EADDRINUSE.
    """
    address = f"inproc://monitor-{next(_monitor_numbers)}"
    sock.monitor(address, events)
    monitor: Socket = context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.connect(address)
    return monitor


def receive_event(monitor: Socket, flags: int = 0) -> int:
    """The next event of a socket, from its monitor: such as `zmq.EVENT_CONNECTED`.

    `zmq.utils.monitor` does the same, and imports `asyncio` sockets for it.

    Raises:
        Again: there is none, and `flags` is `zmq.NOBLOCK`.
    """
    return receive_full_event(monitor, flags)[0]


def receive_full_event(monitor: Socket, flags: int = 0) -> tuple[int, int, str]:
    """As `receive_event`: the event, its value (of `zmq.EVENT_CONNECTED` the descriptor), and the address."""
    told, address = monitor.recv_multipart(flags)
    event, value = _MONITOR_EVENT.unpack(told)
    return event, value, address.decode()


def receive_event_and_file(monitor: Socket) -> tuple[int, int]:
    """The same, with what the event says of its connection: its descriptor, or an error."""
    told, _ = monitor.recv_multipart()
    event, value = _MONITOR_EVENT.unpack(told)
    return event, value


def keep_to_the_end(endpoint: object) -> None:
    """Let the system close the sockets of `endpoint` when the process is gone, and nothing before.

    The interpreter lets go of objects while it ends, and pyzmq closes the sockets of those that it lets go of. After
    that the process may still have much to do. This takes a reference that is never given back.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(endpoint))


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port` (or `broker://host:port`); an IPv6 host may stand in brackets.

    Raises:
        ConfigError: there is no port, or it is not a number from 0 to 65535.
    """
    rest = address.split("://", 1)[-1]
    host, colon, port = rest.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ConfigError(
            f"{address!r} is not an address: write it as tcp://HOST:PORT, for example tcp://127.0.0.1:5555"
        )
    return host.strip("[]"), int(port)


def for_lookup(host: str) -> bytes:
    """`host` as `getaddrinfo` is to be given it: for a `str` Python loads its tables of international names.

    Raises:
        OSError: no host can have that name.
    """
    if host.isascii():
        return host.encode()
    try:
        return host.encode("idna")
    except UnicodeError as error:
        raise OSError(f"{host!r} cannot be the name of a host: {error}") from error


def open_connection(host: str, port: int, timeout_s: float) -> pysocket.socket:
    """A plain TCP connection, which has the same limit for what is read and written later.

    Raises:
        OSError: the name is not known, or nothing listens there.
    """
    address: Any = (for_lookup(host), port)
    return pysocket.create_connection(address, timeout=timeout_s)


def resolve(address: str) -> str:
    """The same address with its host as a number: ZeroMQ takes a name in a bind for that of a network interface.

    Raises:
        ConfigError: the host name cannot be resolved.
    """
    host, port = split_address(address)
    if host == "*":
        host = "0.0.0.0"
    try:
        infos = pysocket.getaddrinfo(for_lookup(host), port, type=pysocket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"the host of {address!r} cannot be resolved ({error}): check the name, or give a number"
        ) from error
    infos.sort(key=lambda info: info[0] != pysocket.AF_INET)
    family, _, _, _, found = infos[0]
    number, zone = str(found[0]), int([*found, 0, 0][3])
    if family == pysocket.AF_INET6 and zone and "%" not in number:
        number += f"%{pysocket.if_indextoname(zone)}"  # a link-local address means nothing without its interface
    return f"tcp://[{number}]:{port}" if ":" in number else f"tcp://{number}:{port}"


def bind(sock: Socket, address: str, credentials: Credentials | None) -> str:
    """Bind to `address` (port 0: any free one) and return the address as bound.

    Without credentials it warns once a bind when that is not on the loopback interface: any peer that reaches the port
    can run code in this process.

    Args:
        sock: what is to listen.
        address: where.
        credentials: who may connect; None: anybody.

    Raises:
        ConfigError: the address is not usable here or is taken; or anybody could connect to any interface.
    """
    numeric = resolve(address)
    host, _ = split_address(numeric)
    if credentials is not None:
        credentials.set_listening(sock)
    elif ipaddress.ip_address(host.split("%")[0]).is_unspecified:
        raise ConfigError(
            f"without authentication (insecure) nothing listens on all interfaces ({address}): name the one, or leave "
            "insecure out"
        )
    if ":" in host:
        sock.setsockopt(zmq.IPV6, 1)
    is_loopback = ipaddress.ip_address(host.split("%")[0]).is_loopback
    if is_loopback:
        sock.setsockopt(zmq.SNDBUF, LOOPBACK_BUFFER_NBYTES)
    try:
        sock.bind(numeric)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}. "
            "Choose another port (0: any free one) or an address of this machine"
        ) from error
    bound = sock.getsockopt_string(zmq.LAST_ENDPOINT)
    if not is_loopback and credentials is None:
        warnings.warn(
            f"zrpc listens on {bound}, off the loopback interface, and without authentication (insecure): any peer "
            "that reaches this port can run code here. Leave insecure out, or keep the port behind a firewall.",
            stacklevel=3,
        )
    return bound


def connect(sock: Socket, address: str, credentials: Credentials | None, listener: Incarnation | None = None) -> None:
    """Connect to `address`; ZeroMQ goes on trying in the background until the socket is closed.

    Args:
        sock: what connects.
        address: where to.
        credentials: what it proves there, and who must listen; None: nothing, and anybody.
        listener: the worker that must; None: a broker. See `Credentials.set_connecting`.

    Raises:
        ConfigError: the address cannot be resolved or is not one, or the worker has no key that is valid.
    """
    numeric = resolve(address)
    host, _ = split_address(numeric)
    if ":" in host:
        sock.setsockopt(zmq.IPV6, 1)
    if ipaddress.ip_address(host.split("%")[0]).is_loopback:
        sock.setsockopt(zmq.SNDBUF, LOOPBACK_BUFFER_NBYTES)
    if credentials is not None:
        credentials.set_connecting(sock, listener)
    sock.connect(numeric)


def reachable_address(bound: str, toward: str | None) -> str:
    """What to tell others who shall connect to `bound`: itself, or for a bind to every interface this host's address.

    Args:
        bound: the address as bound.
        toward: a host of the group; the interface on the way to it is taken.
    """
    host, port = split_address(bound)
    if not ipaddress.ip_address(host.split("%")[0]).is_unspecified:
        return bound
    with pysocket.socket(pysocket.AF_INET6 if ":" in host else pysocket.AF_INET, pysocket.SOCK_DGRAM) as probe:
        try:
            probe.connect((toward or "192.0.2.1", 9))  # no packet is sent: this only chooses a route
            own = str(probe.getsockname()[0])
        except OSError:
            own = pysocket.gethostbyname(pysocket.gethostname())
    return f"tcp://[{own}]:{port}" if ":" in own else f"tcp://{own}:{port}"
