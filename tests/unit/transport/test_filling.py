"""Slabs that are filled while their message travels: nobody reads them before, nobody takes them, and nobody hangs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.unit.transport.slab_messages import A, B, Told, begin, copies, fetch, place
from tests.unit.transport.test_carrier import Wire, carrier
from tests.unit.transport.test_shared_memory import pair
from tests.unit.transport.test_slabs import attachments, buffer, pool
from zrpc.errors import AgentClosedError, OverloadedError, PeerLostError, ProtocolError, ZrpcError
from zrpc.transport import slabs
from zrpc.transport.filling import MAX_NBYTES, Filling, Unfilled
from zrpc.transport.packets import Bundle, OwnedFile
from zrpc.wire.envelope import Envelope, decode
from zrpc.wire.messages import Reply

if TYPE_CHECKING:
    from zrpc.transport.attachments import Attachments
    from zrpc.transport.shared_memory import SharedMemory
    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")
__all__ = ["attachments"]  # a fixture


def begun(receiver: Attachments, told: Told) -> tuple[memoryview, Filling]:
    """What a message told of that came before it was whole."""
    unfilled: Unfilled = []
    came = fetch(receiver, told, unfilled=unfilled)
    assert len(unfilled) == 1
    return came, Filling(unfilled, lambda: False)


def test_a_slab_is_whole_once_it_is_filled(attachments: Attachments) -> None:
    with pool() as sender:
        original = bytearray(buffer(100_000))
        told, later = begin(sender, memoryview(original))
        came, filling = begun(attachments, told)
        assert not filling.wait(time.monotonic())
        sender.fill(later)
        original[:] = bytes(100_000)  # it may be written to from now on
        assert filling.wait(time.monotonic())
        assert came == buffer(100_000)


def test_one_that_is_whole_when_its_message_comes_is_as_any_other(attachments: Attachments) -> None:
    with pool() as sender:
        told, later = begin(sender, buffer(100_000))
        sender.fill(later)
        assert fetch(attachments, told) == buffer(100_000)


def test_who_waits_goes_on_once_it_is_whole(attachments: Attachments) -> None:
    with pool() as sender:
        told, later = begin(sender, buffer(100_000))
        came, filling = begun(attachments, told)
        seen: list[bool] = []
        waiting = threading.Thread(target=lambda: seen.append(filling.wait(None) and came == buffer(100_000)))
        waiting.start()
        sender.fill(later)
        waiting.join()
        assert seen == [True]


def test_a_slab_that_was_let_go_of_before_it_was_whole_is_not_taken_until_then(attachments: Attachments) -> None:
    with pool() as sender:
        told, later = begin(sender, buffer(100_000))
        came, _ = begun(attachments, told)
        del came
        assert sender.counts()["held"] == 1
        other = place(sender, buffer(100_000, 1))
        assert other.number != told.number, "somebody fills it still"
        sender.fill(later)
        assert sender.counts()["held"] == 1
        again = place(sender, buffer(100_000, 2))
        assert again.number == told.number


def test_one_that_is_given_up_is_let_go_of_and_who_waits_is_told(attachments: Attachments) -> None:
    with pool() as sender:
        told, _ = begin(sender, buffer(100_000))
        _, filling = begun(attachments, told)
        sender.give_up(told.descriptor)
        with pytest.raises(ProtocolError, match="was interrupted as it wrote"):
            filling.wait(None)
        assert sender.counts()["slabs"] == 0


def test_of_one_that_was_placed_anew_nothing_is_given_up(attachments: Attachments) -> None:
    """Its message was interrupted once it had left, and its receiver was done before the sender came to that."""
    with pool() as sender:
        first, later = begin(sender, buffer(100_000))
        sender.fill(later)
        del later
        fetch(attachments, first)  # and lets go of it
        again, later = begin(sender, buffer(100_000, 1))
        assert again.number == first.number, "the same slab"
        came, filling = begun(attachments, again)
        sender.give_up(first.descriptor)
        sender.take_back(first.descriptor)
        sender.fill(later)
        assert filling.wait(time.monotonic())
        assert came == buffer(100_000, 1)
        assert sender.counts()["held"] == 1


def test_one_that_nobody_was_told_of_is_free() -> None:
    with pool() as sender:
        told, _ = begin(sender, buffer(100_000))
        sender.take_back(told.descriptor)
        assert sender.counts()["held"] == 0
        again = place(sender, buffer(100_000))
        assert again.number == told.number


def test_larger_buffers_are_filled_in_at_once(attachments: Attachments) -> None:
    with pool() as sender:
        told, later = begin(sender, memoryview(bytes(MAX_NBYTES + 1)))
        assert not later
        assert len(fetch(attachments, told)) == MAX_NBYTES + 1


SENDER = """
import json, socket, sys
from zrpc.transport.slabs import SlabPool
pool, later, files = SlabPool(), [], []
message = json.dumps(pool.place(b"B" * 8, bytes(100_000), later, files)).encode()
with socket.socket(fileno=int(sys.argv[1])) as wire:
    socket.send_fds(wire, [message], [file.fd for file in files])
    wire.recv(1)
"""


def test_if_the_sender_dies_before_it_is_whole_who_waits_is_told_once_its_loss_is_known(
    attachments: Attachments,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", SENDER, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as sender:
            theirs.close()
            message, fds, *_ = socket.recv_fds(ours, 1000, 1)
            _, filling = begun(attachments, Told(json.loads(message), [OwnedFile(fd) for fd in fds]))
            assert not filling.wait(time.monotonic() + 0.01), "it lives"
            sender.kill()
            sender.wait()
            assert not filling.wait(time.monotonic()), "nothing tells of it yet"
            attachments.forget(A)
            with pytest.raises(PeerLostError, match="the sender is lost, or gave up"):
                filling.wait(None)


@pytest.mark.parametrize("how", ["it is lost", "its owner has let go of it", "this worker shuts down"])
def test_nobody_waits_for_what_will_not_come(attachments: Attachments, how: str) -> None:
    with pool() as sender:
        told, _ = begin(sender, buffer(100_000))
        unfilled: Unfilled = []
        fetch(attachments, told, unfilled=unfilled)
        is_over = threading.Event()
        ends: list[type[Exception]] = []

        def wait() -> None:
            try:
                Filling(unfilled, is_over.is_set).wait(None)
            except ZrpcError as error:
                ends.append(type(error))

        waiting = threading.Thread(target=wait)
        waiting.start()
        if how == "it is lost":
            attachments.forget(A)
        elif how == "its owner has let go of it":
            sender.reclaim(B)
        else:
            is_over.set()
        waiting.join()
        assert ends == [AgentClosedError if how == "this worker shuts down" else PeerLostError]


# ---- in messages -----------------------------------------------------------------------------------------------------


class Watched(Wire):
    """Looks at what is sent as it leaves, as its receiver may; then raises `end`, if there is one."""

    def __init__(self, receiver: SharedMemory) -> None:
        super().__init__()
        self._receiver = receiver
        self.came: list[Envelope] = []
        self.unfilled: Unfilled = []
        self.end: BaseException | None = None

    def send(self, peer: bytes, frames: list[Buffer]) -> None:
        super().send(peer, frames)
        files = copies(frames.files) if isinstance(frames, Bundle) else ()
        self.came.append(decode(frames, partial(self._receiver.fetch, B, unfilled=self.unfilled, files=files)))
        if self.end is not None:
            raise self.end


def message(*raw: memoryview) -> Envelope:
    return Envelope(Reply(), 1, None, b"", (), list(raw))


def test_a_message_leaves_before_its_buffers_are_copied_and_they_are_when_it_was_sent() -> None:
    with pair() as (a, b):
        wire = Watched(a)
        carrier(wire, b, takes_files=lambda _: True).send(A, message(buffer(200_000), buffer(200_000, 1)))
        assert len(wire.unfilled) == 2
        assert Filling(wire.unfilled, lambda: False).wait(time.monotonic())
        assert list(wire.came[0].buffers) == [buffer(200_000), buffer(200_000, 1)]
        wire.came.clear()
        assert b.counts()["held"] == 0


@pytest.mark.parametrize("when", ["as it leaves", "as it is copied"])
def test_a_message_that_a_signal_handler_interrupts_is_torn(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as (a, b):
        wire = Watched(a)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        if when == "as it leaves":
            wire.end = KeyboardInterrupt()
        else:
            monkeypatch.setattr(b._pool, "_copy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            carrier(wire, b, takes_files=lambda _: True).send(A, message(buffer(200_000), buffer(200_000, 1)))
        with pytest.raises(ProtocolError, match="was interrupted"):
            Filling(wire.unfilled, lambda: False).wait(None)
        assert b.counts()["slabs"] == 0, "they are let go of: somebody may have them"


def test_a_message_that_cannot_be_packed_leaves_its_slabs_free() -> None:
    """And their files go with the next one."""
    with pair() as (a, b):
        wire = Watched(a)
        with pytest.raises(ProtocolError, match="cannot be packed"):
            carrier(wire, b, takes_files=lambda _: True).send(
                A, Envelope(Reply(), 1, {"unpackable": object()}, b"", (), [buffer(100_000)])
            )
        assert not wire.sent
        assert (b.counts()["slabs"], b.counts()["held"]) == (1, 0)
        carrier(wire, b, takes_files=lambda _: True).send(A, message(buffer(100_000, 1)))
        assert list(wire.came[0].buffers) == [buffer(100_000, 1)]
        wire.came.clear()
        assert (b.counts()["slabs"], b.counts()["held"]) == (1, 0)


def test_the_slabs_of_one_that_is_refused_are_let_go_of() -> None:
    with pair() as (_, b):
        wire = Wire()
        wire.error = OverloadedError("too many wait")
        with pytest.raises(OverloadedError):
            carrier(wire, b, takes_files=lambda _: True).send(A, message(buffer(100_000)))
        assert b.counts()["slabs"] == 0, "it may be among those that wait"
