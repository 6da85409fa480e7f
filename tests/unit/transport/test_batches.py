"""Small answers that leave together: in order, whole, soon, and only where more requests lie there."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from tests.logs import handled_by
from zrpc import finalizers
from zrpc.errors import OverloadedError, PeerLostError, ProtocolError
from zrpc.transport import batches
from zrpc.transport.batches import MAX_AGE_S, MAX_COUNT, MAX_NBYTES, Batches, is_batch, messages_of
from zrpc.transport.carrier import Carrier
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Leave, Reply

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Sequence

    from zrpc.wire.envelope import Buffer

WAIT_S = 10.0

A, B, C = b"A" * 8, b"B" * 8, b"C" * 8


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Wire:
    """Keeps what is sent; peers in `errors` raise theirs."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, list[bytes]]] = []
        self.errors: dict[bytes, Exception] = {}
        self.forgotten: list[bytes] = []

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        if peer in self.errors:
            raise self.errors[peer]
        self.sent.append((peer, messages_of(frames) if is_batch(frames) else [bytes(frame) for frame in frames]))


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(batches, "time", made)
    return made


def test_what_is_kept_leaves_together_and_in_order(wire: Wire, clock: Clock) -> None:
    kept = Batches(wire.send, wire.forgotten.append)
    for peer, message in ((A, b"one"), (B, b"two"), (A, b"three"), (A, b"four")):
        kept.add(peer, message)
    assert not wire.sent
    kept.flush()
    assert wire.sent == [(A, [b"one", b"three", b"four"]), (B, [b"two"])]
    kept.flush()
    assert len(wire.sent) == 2


def test_a_message_alone_leaves_as_it_is(clock: Clock) -> None:
    frames: list[Sequence[Buffer]] = []
    kept = Batches(lambda _, sent: frames.append(sent), lambda _: None)
    kept.add(A, b"one")
    kept.flush()
    assert [list(sent) for sent in frames] == [[b"one"]]


def test_as_many_leave_as_are_enough(wire: Wire, clock: Clock) -> None:
    kept = Batches(wire.send, wire.forgotten.append)
    for number in range(MAX_COUNT):
        assert not wire.sent
        kept.add(A, bytes([number]))
    assert wire.sent == [(A, [bytes([number]) for number in range(MAX_COUNT)])]


def test_as_much_leaves_as_is_enough(wire: Wire, clock: Clock) -> None:
    kept = Batches(wire.send, wire.forgotten.append)
    kept.add(A, bytes(MAX_NBYTES - 1))
    assert not wire.sent
    kept.add(B, b"x")
    assert wire.sent == [(A, [bytes(MAX_NBYTES - 1)]), (B, [b"x"])]


def test_nothing_is_kept_for_long_once_more_comes(wire: Wire, clock: Clock) -> None:
    kept = Batches(wire.send, wire.forgotten.append)
    kept.add(A, b"one")
    clock.now += MAX_AGE_S * 1.01
    kept.add(A, b"two")
    assert wire.sent == [(A, [b"one", b"two"])]
    clock.now += 10
    kept.add(A, b"three")
    assert len(wire.sent) == 1, "it is young"


@pytest.mark.parametrize(
    "error", [PeerLostError("it is gone"), OverloadedError("it does not read"), OSError("no file can be opened")]
)
def test_a_peer_that_cannot_be_sent_to_is_in_nobodys_way(wire: Wire, clock: Clock, error: Exception) -> None:
    kept = Batches(wire.send, wire.forgotten.append)
    wire.errors[A] = error
    for peer in (A, B, A):
        kept.add(peer, b"x")
    kept.flush()
    assert wire.sent == [(B, [b"x"])]
    assert wire.forgotten == ([A] if isinstance(error, PeerLostError) else [])
    wire.errors.clear()
    kept.add(A, b"y")
    kept.flush()
    assert wire.sent[1:] == [(A, [b"y"])]


def test_nothing_is_logged_under_the_lock_of_the_batches(wire: Wire) -> None:
    """A handler of the log may have another thread send, and wait for it."""
    kept = Batches(wire.send, wire.forgotten.append)
    wire.errors[A] = OSError("no file can be opened")
    had_to_wait: list[bool] = []

    def handle(_: logging.LogRecord) -> None:
        sends = threading.Thread(target=kept.add, args=(B, b"told"))
        sends.start()
        sends.join(WAIT_S)
        had_to_wait.append(sends.is_alive())

    with handled_by(handle):
        kept.add(A, b"x")
        kept.flush()
        finalizers.run_pending()
    assert had_to_wait == [False]


def test_when_it_is_closed_what_is_kept_leaves_and_nothing_is_kept_any_more(wire: Wire, clock: Clock) -> None:
    kept = Batches(wire.send, wire.forgotten.append)
    kept.add(A, b"one")
    kept.close()
    kept.add(A, b"two")
    assert wire.sent == [(A, [b"one"]), (A, [b"two"])]


@pytest.mark.parametrize("rest", [b"", b"\xc1", msgpack.packb(1), msgpack.packb([1]), msgpack.packb([b"x", "y"])])
def test_a_damaged_batch_is_refused(rest: bytes) -> None:
    frames = [b"\xc1\x03" + rest]
    assert is_batch(frames)
    with pytest.raises(ProtocolError, match="a batch"):
        messages_of(frames)


# ---- in a carrier ----------------------------------------------------------------------------------------------------


class FakeInbox:
    """What a carrier needs of an inbox.

    Attributes:
        on_queue_empty: what the carrier has asked to be called then.
        serves_queue_here: set by a test.
    """

    on_queue_empty: Callable[[], None]
    serves_queue_here = False

    def tell(self, on_queue_empty: Callable[[], None], on_callers_left: Callable[[], None]) -> None:
        self.on_queue_empty = on_queue_empty


class Ends:
    """A carrier without sockets. `receive` has it take frames in; what came is in `came`."""

    def __init__(self, wire: Wire) -> None:
        self.inbox = FakeInbox()
        self.came: list[Envelope] = []
        self.receive: Callable[[bytes, list[Buffer]], Any]
        endpoint: Any = SimpleNamespace(
            send=wire.send, start=self._start, inbox=self.inbox, interrupt=None, incarnation=B, is_encrypted=False
        )
        self.carrier = Carrier(endpoint, None)
        self.carrier.start(lambda _, envelope: self._take(envelope), lambda *_: None, lambda: None)

    def _start(self, on_frames: Any, _: object) -> None:
        self.receive = on_frames

    def _take(self, envelope: Envelope) -> Any:
        self.came.append(envelope)
        return None if isinstance(envelope.message, Reply) else self.came.pop


def answer(number: int, nbytes: int = 0) -> Envelope:
    return Envelope(Reply(), number, None, bytes(nbytes))


def test_only_small_answers_of_a_queue_are_kept(wire: Wire, clock: Clock) -> None:
    ends = Ends(wire)
    ends.carrier.send(A, answer(1), may_lie=True)
    assert len(wire.sent) == 1, "no queue has formed"
    ends.inbox.serves_queue_here = True
    ends.carrier.send(A, answer(2))
    assert len(wire.sent) == 2, "it must not lie"
    ends.carrier.send(A, answer(3, MAX_NBYTES), may_lie=True)
    assert len(wire.sent) == 3, "it is large"
    ends.carrier.send(A, answer(4), may_lie=True)
    ends.carrier.send(A, answer(5), may_lie=True)
    assert len(wire.sent) == 3
    ends.inbox.on_queue_empty()
    assert wire.sent[3:] == [(A, [bytes(encode(answer(number))[0]) for number in (4, 5)])]


def numbers(wire: Wire) -> list[int]:
    """The call ids of the answers that were sent, in order."""
    return [decode([message]).call_id for _, messages in wire.sent for message in messages]


def test_other_messages_do_not_overtake_what_is_kept(wire: Wire, clock: Clock) -> None:
    ends = Ends(wire)
    ends.inbox.serves_queue_here = True
    ends.carrier.send(A, answer(1), may_lie=True)
    ends.carrier.send(A, answer(2), may_lie=True)
    ends.carrier.send(A, answer(3))
    assert numbers(wire) == [1, 2, 3]


def test_nothing_is_kept_where_another_thread_has_begun_to_read(wire: Wire, clock: Clock) -> None:
    ends = Ends(wire)
    looks = [True, False]
    ends.carrier.inbox = ends.inbox = type("Inbox", (), {"serves_queue_here": property(lambda _: looks.pop(0))})()
    ends.carrier.send(A, answer(1), may_lie=True)
    assert numbers(wire) == [1]


def test_the_messages_of_a_batch_are_taken_in_as_any_other(wire: Wire) -> None:
    ends = Ends(wire)
    messages = [bytes(encode(envelope)[0]) for envelope in (answer(1), answer(2), Envelope(Leave(), 3))]
    work = ends.receive(A, [b"\xc1\x03" + msgpack.packb([messages[0], b"damaged", *messages[1:]])])
    assert [envelope.call_id for envelope in ends.came] == [1, 2, 3]
    work()  # what one of them asked for
    assert [envelope.call_id for envelope in ends.came] == [1, 2]


def test_what_is_neither_an_envelope_nor_anything_else_is_dropped(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    ends = Ends(wire)
    assert ends.receive(A, [b"\xc1\x77"]) is None
    finalizers.run_pending()
    assert "begins with b'\\xc1w'" in caplog.text
    assert not ends.came


@pytest.mark.parametrize("messages", [[b"\xc1\x03\x90"], [b"\xc1\x01" + bytes(8)], [b"\x90"] * 17])
def test_a_batch_holds_a_few_envelopes_and_nothing_else(messages: list[bytes]) -> None:
    """No batch, which would be read within this one, and no more than a sender puts into one."""
    with pytest.raises(ProtocolError, match="batch"):
        messages_of([b"\xc1\x03" + msgpack.packb(messages)])
