"""Addresses, and sockets as they are made."""

from __future__ import annotations

import socket as pysocket
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq

from tests.unit.transport.endpoints import CREDENTIALS
from zrpc.errors import ConfigError
from zrpc.transport import silence, sockets

if TYPE_CHECKING:
    from collections.abc import Iterator


Make = Callable[[int], sockets.Socket]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes sockets of one context, and closes them in the end."""
    with sockets.make_context() as context, ExitStack() as made:
        yield lambda kind: made.enter_context(sockets.make_socket(context, kind))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://127.0.0.1:0", ("127.0.0.1", 0)),
        ("tcp://host.example:65535", ("host.example", 65535)),
        ("broker://host:5555", ("host", 5555)),
        ("host:1", ("host", 1)),
        ("tcp://[::1]:5", ("::1", 5)),
        ("tcp://::1:5", ("::1", 5)),
        ("tcp://*:7", ("*", 7)),
    ],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert sockets.split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "host",
        "tcp://host",
        "tcp://host:",
        "tcp://:5",
        "tcp://h:65536",
        "tcp://h:-1",
        "tcp://h:x",
        "tcp://h:²",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match="is not an address: write it as tcp://HOST:PORT"):
        sockets.split_address(address)


def test_hosts_become_numbers() -> None:
    assert sockets.resolve("tcp://127.0.0.1:5") == "tcp://127.0.0.1:5"
    assert sockets.resolve("broker://localhost:5") == "tcp://127.0.0.1:5"
    assert sockets.resolve("tcp://*:5") == "tcp://0.0.0.0:5"
    assert sockets.resolve("tcp://[::1]:5") == "tcp://[::1]:5"


def test_an_ipv4_number_is_taken_before_an_ipv6_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: bytes, port: int, **_: object) -> list[Any]:
        six = (pysocket.AF_INET6, pysocket.SOCK_STREAM, 6, "", ("fd00::1", port, 0, 0))
        four = (pysocket.AF_INET, pysocket.SOCK_STREAM, 6, "", ("10.0.0.1", port))
        return [six, four] if host == b"both" else [six]

    monkeypatch.setattr(pysocket, "getaddrinfo", lookup)
    assert sockets.resolve("tcp://both:5") == "tcp://10.0.0.1:5"
    assert sockets.resolve("tcp://six:5") == "tcp://[fd00::1]:5"


@pytest.mark.parametrize(
    "host",
    ["no-such-host.invalid", "nö-such-host.invalid", "x" * 64 + ".invalid", "ö" * 64 + ".invalid", "a..b.invalid"],
)
def test_a_name_that_does_not_resolve_is_refused_in_words(host: str) -> None:
    """One that is no possible name too, for which Python may raise another error than for one that is unknown."""
    with pytest.raises(ConfigError, match=rf"host of 'tcp://{host}:5' cannot be resolved"):
        sockets.resolve(f"tcp://{host}:5")


def test_an_international_name_is_looked_up_as_dns_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ASCII (`xn--...`)."""
    asked: list[object] = []

    def lookup(host: object, port: int, **_: object) -> list[Any]:
        asked.append(host)
        return [(pysocket.AF_INET, pysocket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(pysocket, "getaddrinfo", lookup)
    for host in ("bücher.example", "plain.example"):
        assert sockets.resolve(f"tcp://{host}:5") == "tcp://10.0.0.1:5"
    assert asked == [b"xn--bcher-kva.example", b"plain.example"]


def test_binding_tells_the_port(make: Make) -> None:
    sock = make(zmq.ROUTER)
    bound = sockets.bind(sock, "tcp://localhost:0", None)
    host, port = sockets.split_address(bound)
    assert host == "127.0.0.1"
    assert port > 0


def test_a_monitor_tells_events() -> None:
    """The numbers are those of ZeroMQ, from the first one to the last that a connection has."""
    with sockets.make_context() as context, ExitStack() as made:
        listener, sender = (made.enter_context(sockets.make_socket(context, kind)) for kind in (zmq.PULL, zmq.PUSH))
        monitor = made.enter_context(sockets.make_monitor(context, sender, zmq.EVENT_ALL))
        with pytest.raises(zmq.Again):
            sockets.receive_event(monitor, zmq.NOBLOCK)
        sockets.connect(sender, sockets.bind(listener, "tcp://127.0.0.1:0", None), None)
        told = []
        while zmq.EVENT_HANDSHAKE_SUCCEEDED not in told:
            told.append(sockets.receive_event(monitor))
        assert zmq.EVENT_CONNECTED in told
        sender.disable_monitor()
        assert sockets.receive_event(monitor) == zmq.EVENT_MONITOR_STOPPED


def test_a_taken_port_is_refused_in_words(make: Make) -> None:
    bound = sockets.bind(make(zmq.ROUTER), "tcp://127.0.0.1:0", None)
    with pytest.raises(
        ConfigError, match=r"cannot listen on tcp://127.0.0.1:\d+: Address already in use .* Choose another"
    ):
        sockets.bind(make(zmq.ROUTER), bound, None)


def test_an_address_of_another_machine_is_refused_in_words(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on tcp://192\.0\.2\.1:0"):
        sockets.bind(make(zmq.ROUTER), "tcp://192.0.2.1:0", None)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0"])
def test_without_authentication_nothing_listens_on_all_interfaces(make: Make, address: str) -> None:
    with pytest.raises(ConfigError, match="name the one, or leave insecure out"):
        sockets.bind(make(zmq.ROUTER), address, None)


def test_without_authentication_it_warns_off_the_loopback_interface(make: Make) -> None:
    host = own_host()
    with pytest.warns(UserWarning, match="off the loopback interface, and without authentication"):
        sockets.bind(make(zmq.ROUTER), f"tcp://{host}:0", None)


def test_with_authentication_it_does_not(make: Make, recwarn: pytest.WarningsRecorder) -> None:
    sockets.bind(make(zmq.ROUTER), "tcp://0.0.0.0:0", CREDENTIALS)
    assert not recwarn.list


def own_host() -> str:
    """This machine's address on a network."""
    host, _ = sockets.split_address(sockets.reachable_address("tcp://0.0.0.0:1", None))
    if host.startswith("127."):
        pytest.skip("this machine is on no network")
    return host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_connections_have_small_buffers(make: Make, host: str) -> None:
    receiver, sender = make(zmq.ROUTER), make(zmq.DEALER)
    bound = sockets.bind(receiver, f"tcp://{host}:0", None)
    sockets.connect(sender, bound, None)
    assert [sock.getsockopt(zmq.SNDBUF) for sock in (receiver, sender)] == [sockets.LOOPBACK_BUFFER_NBYTES] * 2


def test_other_connections_have_those_of_the_kernel(make: Make) -> None:
    receiver, sender = make(zmq.ROUTER), make(zmq.DEALER)
    sockets.bind(receiver, "tcp://0.0.0.0:0", CREDENTIALS)
    sockets.connect(sender, "tcp://192.0.2.1:9", CREDENTIALS)
    assert [sock.getsockopt(zmq.SNDBUF) for sock in (receiver, sender)] == [-1] * 2


def test_ipv6_works_where_the_host_has_it(make: Make) -> None:
    with pysocket.socket(pysocket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this host has no IPv6")
    receiver, sender = make(zmq.PULL), make(zmq.PUSH)
    bound = sockets.bind(receiver, "tcp://[::1]:0", None)
    assert bound.startswith("tcp://[::1]:")
    sockets.connect(sender, bound, None)
    sender.send(b"x")
    assert receiver.poll(10_000)
    assert receiver.recv() == b"x"


def test_a_link_local_address_keeps_its_zone(make: Make) -> None:
    addresses = [
        f"{address.address.split('%')[0]}%{interface}"
        for interface, found in psutil.net_if_addrs().items()
        for address in found
        if address.family == pysocket.AF_INET6 and address.address.startswith("fe80")
    ]
    if not addresses:
        pytest.skip("this host has no link-local address")
    with pytest.warns(UserWarning, match="off the loopback interface"):
        bound = sockets.bind(make(zmq.PULL), f"tcp://[{addresses[0]}]:0", None)
    assert bound.startswith(f"tcp://[{addresses[0]}]:")


def test_every_socket_is_made_with_the_same_options(make: Make) -> None:
    sock = make(zmq.DEALER)
    assert sock.getsockopt(zmq.LINGER) == 0
    assert sock.getsockopt(zmq.SNDHWM) == sock.getsockopt(zmq.RCVHWM) == sockets.HIGH_WATER_MARK
    assert sock.getsockopt(zmq.HEARTBEAT_IVL) == sockets.HEARTBEAT_INTERVAL_MS
    assert sock.getsockopt(zmq.MAXMSGSIZE) == sockets.MAX_FRAME_NBYTES


def test_the_kernel_may_say_who_is_gone_instead_of_heartbeats() -> None:
    with sockets.make_context() as context, sockets.make_socket(context, zmq.DEALER, heartbeats=False) as sock:
        assert sock.getsockopt(zmq.HEARTBEAT_IVL) == 0
        assert sock.getsockopt(zmq.TCP_KEEPALIVE) == 1
        assert sock.getsockopt(zmq.TCP_KEEPALIVE_IDLE) == 1
        limit_ms = 0 if silence.IS_KNOWN else sockets.UNACKNOWLEDGED_MAX_MS
        assert sock.getsockopt(zmq.TCP_MAXRT) == limit_ms, "it would end connections to a process that stands still"


def test_a_socket_may_have_an_identity() -> None:
    with sockets.make_context() as context, sockets.make_socket(context, zmq.DEALER, identity=b"12345678") as sock:
        assert sock.getsockopt(zmq.ROUTING_ID) == b"12345678"


def test_a_router_says_when_a_peer_is_unknown(make: Make) -> None:
    router = make(zmq.ROUTER)
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"nobody", b"x"])
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_a_context_holds_many_sockets() -> None:
    with sockets.make_context() as context:
        assert context.get(zmq.MAX_SOCKETS) == sockets.MAX_SOCKETS


def test_what_others_are_told_can_be_reached() -> None:
    assert sockets.reachable_address("tcp://127.0.0.1:5", None) == "tcp://127.0.0.1:5"
    assert sockets.reachable_address("tcp://10.1.2.3:5", "10.0.0.1") == "tcp://10.1.2.3:5"
    assert sockets.reachable_address("tcp://0.0.0.0:5", "127.0.0.1") == "tcp://127.0.0.1:5"
    assert sockets.reachable_address("tcp://0.0.0.0:5", "localhost") == "tcp://127.0.0.1:5"
    host, port = sockets.split_address(sockets.reachable_address("tcp://0.0.0.0:5", None))
    assert port == 5
    assert host != "0.0.0.0"


def test_without_a_route_the_hosts_own_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pysocket, "gethostname", lambda: "localhost")
    assert sockets.reachable_address("tcp://0.0.0.0:5", "no-such-host.invalid") == "tcp://127.0.0.1:5"
