"""When the other end of a connection is silent."""

from __future__ import annotations

import os
import socket

import pytest

from zrpc.transport.silence import IS_KNOWN, Account, account_of, is_gone

QUIET_MS = 5_000


@pytest.mark.parametrize(
    ("account", "is_silent"),
    [
        (Account(0, 0, 0, 900, 0), False),
        (Account(0, 0, 0, QUIET_MS, 0), True),
        (Account(9, 9, 1, 900, 0), False),
        (Account(2, 0, 1, QUIET_MS, 0), True),
        (Account(1, 0, 1, QUIET_MS, 0), False),
        (Account(0, 2, 0, QUIET_MS, 1 << 20), True),
        (Account(0, 1, 0, QUIET_MS, 1 << 20), False),
        (Account(0, 0, 0, QUIET_MS, 1 << 20), False),
    ],
)
def test_a_closed_window_that_is_acknowledged_is_no_silence(account: Account, is_silent: bool) -> None:
    """Probes of a closed window are rare: one that has just left was not left unanswered."""
    assert account.is_silent(4.0) == is_silent


@pytest.mark.skipif(not IS_KNOWN, reason="this system does not tell")
def test_the_kernel_tells_of_a_connection_and_of_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as connection:
            accepted, _ = server.accept()
            with accepted:
                account = account_of(connection.fileno(), port)
                assert account is not None
                assert not account.is_silent(4.0)
                assert account_of(connection.fileno(), port + 1) is None, "another connection has its descriptor by now"
                accepted.sendall(b"still open")
                assert connection.recv(10) == b"still open"
    with open("/dev/null", "rb") as file:
        assert account_of(file.fileno(), port) is None


def test_of_what_is_no_open_connection_nothing_is_known() -> None:
    end, other = os.pipe()
    try:
        assert not is_gone(end, 0.0)
    finally:
        os.close(end)
        os.close(other)
    assert not is_gone(end, 0.0)
    assert not is_gone(None, 0.0)
