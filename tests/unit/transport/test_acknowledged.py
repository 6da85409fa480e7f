"""Whether another host still acknowledges. Where it does not is tested with networks that are cut."""

from __future__ import annotations

import os
import socket

from zrpc.transport.acknowledged import is_gone


def test_a_process_that_does_not_read_is_not_taken_for_a_host_that_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        sock.send(b"never read")
        assert not is_gone(sock.fileno(), 0.0)


def test_of_what_is_no_open_connection_nothing_is_known() -> None:
    end, other = os.pipe()
    try:
        assert not is_gone(end, 0.0)
    finally:
        os.close(end)
        os.close(other)
    assert not is_gone(end, 0.0)
    assert not is_gone(None, 0.0)
