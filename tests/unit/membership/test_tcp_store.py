"""Stores at a host and port: torch's server, and a client of it that asks no name server."""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.integration.harness import free_port
from zrpc import threads
from zrpc.errors import LimitError
from zrpc.membership import store_client, tcp_store
from zrpc.membership.store_client import StoreClient
from zrpc.membership.tcp_store import ListenError, open_tcp_store

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 60.0


@pytest.fixture(params=[True, False], ids=["libuv", "plain"])
def server(request: pytest.FixtureRequest) -> dist.TCPStore:
    """Torch's own store, with each of its two servers."""
    return dist.TCPStore("127.0.0.1", free_port(), None, True, wait_for_workers=False, use_libuv=request.param)


def client_of(server: dist.TCPStore) -> dist.Store:
    return open_tcp_store("127.0.0.1", server.port, is_host=False, timeout_s=LIMIT_S)


@contextmanager
def listener_that_answers(answer: bytes) -> Iterator[int]:
    """A port where each connection gets `answer`, whatever it sends, and is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_client_shares_all_keys_with_torch(server: dist.TCPStore) -> None:
    """What one of them writes the other reads, under the same names, with prefixes too."""
    client = client_of(server)
    assert isinstance(client, StoreClient)
    client.set("text", "grüße")
    client.set("bytes", b"\0\xff")
    server.set("theirs", "x" * 100_000)
    assert (server.get("text"), server.get("bytes")) == ("grüße".encode(), b"\0\xff")
    assert client.get("theirs") == b"x" * 100_000
    assert (client.add("count", 2), server.add("count", -5), client.add("count", 0)) == (2, -3, -3)
    dist.PrefixStore("a/b", client).set("key", "nested")
    assert dist.PrefixStore("a/b", server).get("key") == b"nested"


def test_a_client_answers_as_torchs_does(server: dist.TCPStore) -> None:
    """Each operation, on keys that are there and on others."""
    ours, theirs = client_of(server), server

    def operations(store: dist.Store, own: str) -> list[object]:
        store.set(f"{own}set", "1")
        results: list[object] = [
            store.compare_set(f"{own}new", "", "first"),
            store.compare_set(f"{own}new", "other", "second"),
            store.compare_set(f"{own}new", "first", "third"),
            store.compare_set(f"{own}absent", "expected", "never"),
            store.check([f"{own}new", f"{own}set"]),
            store.check([f"{own}new", f"{own}absent"]),
            store.delete_key(f"{own}set"),
            store.delete_key(f"{own}set"),
            store.check([f"{own}set"]),
            store.has_extended_api(),
        ]
        store.append(f"{own}new", "+")
        store.multi_set([f"{own}one", f"{own}two"], ["1", "22"])
        before = store.num_keys()
        store.set(f"{own}more", "")
        results += [store.get(f"{own}new"), *store.multi_get([f"{own}one", f"{own}two"]), store.num_keys() - before]
        return results

    assert operations(ours, "ours") == operations(theirs, "theirs")


def test_a_key_is_waited_for_up_to_the_time_limit(server: dist.TCPStore) -> None:
    client = client_of(server)
    client.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(RuntimeError, match=r"wait timeout after 0.05 s, keys: absent"):
        client.get("absent")
    client.set_timeout(timedelta(seconds=LIMIT_S))
    setter = threading.Timer(0.05, lambda: server.set("late", "now"))
    setter.start()
    assert client.get("late") == b"now"
    setter.join()


def test_a_store_that_is_gone_is_named() -> None:
    """The text has the address, at the first use after its end and later."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(10, socket.MSG_WAITALL)
                connection.sendall(request[-4:])

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        client = open_tcp_store("127.0.0.1", port, is_host=False, timeout_s=LIMIT_S)
        thread.join()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"the store at 127.0.0.1:{port} "):
                client.add("key", 1)


@pytest.mark.parametrize("announced", [-1, 1 << 60])
def test_a_value_of_a_size_that_none_has_is_not_waited_for(announced: int) -> None:
    """What listens has answered as a store does up to there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(10, socket.MSG_WAITALL)
                connection.sendall(request[-4:])
                connection.recv(1)
                connection.sendall(announced.to_bytes(8, sys.byteorder, signed=True))
                connection.recv(1 << 10)

        thread = threading.Thread(target=serve)
        thread.start()
        client = open_tcp_store("127.0.0.1", listener.getsockname()[1], is_host=False, timeout_s=LIMIT_S)
        with pytest.raises(RuntimeError, match=f"it announced a value of {announced} bytes"):
            client.compare_set("key", "", "value")
        thread.join()


def test_something_else_that_listens_is_an_error() -> None:
    """It may be a store that speaks otherwise, so torch is asked, too."""
    with listener_that_answers(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port, pytest.raises(RuntimeError):
        open_tcp_store("127.0.0.1", port, is_host=False, timeout_s=1)


def test_a_store_that_speaks_otherwise_is_left_to_torchs_client(
    server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of torch's two servers one closes the connection then, and one gives no answer. It is logged."""
    monkeypatch.setattr(store_client, "MAGIC", store_client.MAGIC + 1)
    monkeypatch.setattr(tcp_store, "HANDSHAKE_S", 0.2)
    store = client_of(server)
    store.set("key", "value")
    assert server.get("key") == b"value"
    assert ["torch's own client is used" in record.message for record in caplog.records] == [True]


def test_something_that_never_answers_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(RuntimeError, match="does not answer as a store does"),
    ):
        open_tcp_store("127.0.0.1", listener.getsockname()[1], is_host=False, timeout_s=0.2)


def test_a_port_that_is_taken_is_told_from_other_errors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ListenError, match="EADDRINUSE"):
        open_tcp_store("127.0.0.1", listener.getsockname()[1], is_host=True, timeout_s=LIMIT_S)


@pytest.mark.parametrize("use_libuv", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("group_first", [True, False])
def test_a_process_group_of_the_host_shares_its_store(host: str, group_first: bool, use_libuv: bool) -> None:
    """On the same port, whichever is opened first: what is written to one is read from the other."""
    port = free_port()

    def open_group() -> dist.TCPStore:
        return dist.TCPStore(
            host, port, 1, True, wait_for_workers=False, multi_tenant=True, use_libuv=use_libuv,
            timeout=timedelta(seconds=LIMIT_S),
        )  # fmt: skip

    def open_ours() -> dist.Store:
        return open_tcp_store(host, port, is_host=True, timeout_s=LIMIT_S, use_libuv=use_libuv)

    if group_first:
        theirs, ours = open_group(), open_ours()
    else:
        ours, theirs = open_ours(), open_group()
    ours.set("key", "ours")
    assert theirs.get("key") == b"ours"


def test_a_gloo_group_works_on_a_client() -> None:
    """Backends of programs may be given the store of `init_rpc`."""
    store = open_tcp_store("127.0.0.1", free_port(), is_host=True, timeout_s=LIMIT_S)
    group = dist.ProcessGroupGloo(dist.PrefixStore("group", store), 0, 1, timedelta(seconds=LIMIT_S))
    assert (group.rank(), group.size()) == (0, 1)


@pytest.mark.parametrize("connects", ["before", "after"])
def test_a_server_that_cannot_be_made_is_said_at_once(monkeypatch: pytest.MonkeyPatch, connects: str) -> None:
    """Torch's reason is given, long before the time limit, whether its port still listened at the first look or not."""
    connected = threading.Event()
    connect = socket.create_connection

    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        if connects == "before":
            sock = connect(address, timeout)
            connected.set()
            return sock
        while True:
            connect(address, timeout).close()  # until it is refused

    def refuse(*_: object, master_listen_fd: int, **__: object) -> None:
        if connects == "before":
            assert connected.wait(LIMIT_S)
        os.close(master_listen_fd)  # it is the server's
        raise RuntimeError("no server of that kind")

    monkeypatch.setattr(dist, "TCPStore", refuse)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(RuntimeError, match="no server of that kind"):
        open_tcp_store("127.0.0.1", free_port(), is_host=True, timeout_s=LIMIT_S)


def test_without_a_thread_for_the_server_its_port_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()

    def refuse(*_: object) -> None:
        raise LimitError("no more threads")

    monkeypatch.setattr(threads, "start", refuse)
    with pytest.raises(LimitError) as caught:
        open_tcp_store("127.0.0.1", port, is_host=True, timeout_s=LIMIT_S)
    with socket.create_server(("127.0.0.1", port)):  # though the error holds the frames
        assert caught.value.__traceback__ is not None
