"""Sending: what becomes of memory that both sides share where a message cannot be sent."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from tests.unit.transport.slab_messages import A, B, fetch
from tests.unit.transport.test_shared_memory import pair, send
from tests.unit.transport.test_slabs import buffer
from zrpc.errors import AgentClosedError, PeerLostError, ProtocolError
from zrpc.transport import carrier as module
from zrpc.transport import slabs
from zrpc.transport.carrier import TRIM_S, Carrier
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Reply

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.transport.inbox import Work
    from zrpc.transport.shared_memory import SharedMemory
    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")


class Wire:
    """In place of sockets: keeps what is sent, and then raises `error`, if there is one."""

    def __init__(self) -> None:
        self.sent: list[list[Buffer]] = []
        self.error: Exception | None = None

    def send(self, peer: bytes, frames: list[Buffer]) -> None:
        assert peer == A
        if not isinstance(self.error, PeerLostError):
            self.sent.append(list(frames))
        if self.error is not None:
            raise self.error


@pytest.fixture
def wire() -> Wire:
    return Wire()


def carrier(wire: Wire, memory: SharedMemory, **methods: Any) -> Carrier:
    endpoint: Any = SimpleNamespace(
        send=wire.send,
        queued_nbytes=lambda _: 0,
        is_encrypted=False,
        inbox=SimpleNamespace(tell=lambda *_: None, serves_queue_here=False),
        interrupt=None,
        incarnation=B,
        **{"takes_files": lambda _: True} | methods,
    )
    return Carrier(endpoint, memory)


def answer(a: SharedMemory, b: SharedMemory, extras: dict[str, Any] | None = None) -> Envelope:
    """What B answers A with: what A has sent."""
    came = fetch(b, send(a, B, buffer(100_000)))
    return Envelope(Reply(), 1, extras, b"", (), [came], is_last_use=True)


def test_what_is_sent_back_is_handed_back(wire: Wire) -> None:
    with pair() as (a, b):
        carrier(wire, b).send(A, answer(a, b))
        assert b.counts()["placed"] == 0
        assert a.counts()["held"] == 1
        arrived = decode(wire.sent[0], partial(a.fetch, B, unfilled=[]))
        assert arrived.buffers[0] == buffer(100_000)
        del arrived
        assert a.counts()["held"] == 0


def test_where_the_message_cannot_be_packed_the_slab_is_free(wire: Wire) -> None:
    with pair() as (a, b):
        with pytest.raises(ProtocolError, match="cannot be packed"):
            carrier(wire, b).send(A, answer(a, b, {"unpackable": object()}))
        assert not wire.sent
        assert a.counts()["held"] == 0


def test_where_the_message_may_have_left_the_slab_stays(wire: Wire) -> None:
    with pair() as (a, b):
        wire.error = AgentClosedError("too late")
        with pytest.raises(AgentClosedError):
            carrier(wire, b).send(A, answer(a, b))
        other = fetch(b, send(a, B, buffer(100_000, 1)))
        arrived = decode(wire.sent[0], partial(a.fetch, B, unfilled=[]))
        assert arrived.buffers[0] == buffer(100_000)
        assert other == buffer(100_000, 1)
        assert a.counts()["held"] == 2


def test_to_a_peer_that_is_lost_nothing_is_handed_back(wire: Wire) -> None:
    with pair() as (a, b):
        end = carrier(wire, b)
        late = [answer(a, b)]
        wire.error = PeerLostError("it is gone")
        with pytest.raises(PeerLostError):
            end.send(A, Envelope(Reply(), 2))
        with pytest.raises(PeerLostError):
            end.send(A, late.pop())
        wire.error = None  # its traceback holds what it passed
        assert a.counts()["held"] == 0


def test_a_request_whose_work_fails_takes_none_of_its_batch_along(wire: Wire) -> None:
    """What is to be done for each message of one batch is done, though that for the first raises."""
    started: list[Any] = []
    done: list[int] = []

    def on_envelope(_: Incarnation, envelope: Envelope) -> Work:
        def work() -> None:
            done.append(envelope.call_id)
            if len(done) == 1:
                raise OSError("Expected error")

        return work

    with pair() as (_, b):
        receiver = carrier(wire, b, start=lambda on_frames, _: started.append(on_frames))
        receiver.start(on_envelope, lambda *_: None, lambda: None)
        messages = [bytes(encode(Envelope(Reply(), number))[0]) for number in range(3)]
        with suppress(OSError):
            started[0](A, [b"\xc1\x03" + msgpack.packb(messages)])()
    assert done == [0, 1, 2]


def test_unused_memory_is_given_back_now_and_then_and_not_at_each_call(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trim` looks once in `TRIM_S`, whenever it is called between, and says when it will look again."""
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with pair() as (a, b):
        end = carrier(wire, a)
        fetch(b, send(a, B, buffer(100_000)))
        for _ in range(3):
            assert end.trim() == TRIM_S
        now += TRIM_S / 2
        assert end.trim() == TRIM_S / 2
        for _ in range(2):
            assert a.counts()["slabs"] == 1
            now += TRIM_S
            assert 0 < end.trim() <= TRIM_S
        assert a.counts()["slabs"] == 0
