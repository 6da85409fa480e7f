"""The brokerless transport, two and more endpoints in one process."""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from tests.unit.transport.endpoints import CREDENTIALS, LOOPBACK, WAIT_S, Peer, peers
from tests.waiting import until
from zrpc.errors import AgentClosedError, ConfigError, OverloadedError, PeerLostError
from zrpc.ids import ENDED_MAX, new_incarnation
from zrpc.transport import local_link, socket_link, sockets
from zrpc.transport.peer import PeerEndpoint

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.wire.envelope import Buffer


@pytest.fixture(params=[False, True], ids=["tcp", "local"], autouse=True)
def local(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peer, "local", request.param)


def broken() -> str:
    """Why a peer is lost that has closed its end."""
    return "its process has closed the connection, or is gone" if Peer.local else "its connection broke and is refused"


def numbered(number: int) -> list[bytes]:
    return [number.to_bytes(4, "little")]


def test_messages_arrive_with_their_source_and_in_order() -> None:
    with peers() as (a, b):
        for number in range(1000):
            a.endpoint.send(b.id, numbered(number))
        b.endpoint.send(a.id, [b"back"])
        assert b.arrivals.wait_messages(1000) == [(a.id, numbered(number)) for number in range(1000)]
        assert a.arrivals.wait_messages(1) == [(b.id, [b"back"])]


def test_an_endpoint_can_send_to_itself() -> None:
    with peers(1) as (a,):
        a.endpoint.send(a.id, [b"hello", bytes(5000)])
        assert [bytes(frame) for frame in a.arrivals.wait_messages(1)[0][1]] == [b"hello", bytes(5000)]


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 100_000, 20 << 20])
def test_frames_of_every_size_arrive(nbytes: int) -> None:
    pattern = (bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]
    with peers() as (a, b):
        a.endpoint.send(b.id, [b"head", pattern, b"", memoryview(bytearray(pattern))])
        _, frames = b.arrivals.wait_messages(1)[0]
        assert [bytes(frame) for frame in frames] == [b"head", pattern, b"", pattern]
        kind = bytes if nbytes <= 4096 else memoryview
        assert [type(frame) for frame in frames] == [bytes, kind, bytes, kind]
        if kind is memoryview:
            received: Any = frames[3]
            received[0] = 77
            assert received[0] == 77, "large frames are writable, for tensors to take over"
        del frames
        b.arrivals.messages.clear()


def test_the_memory_of_large_frames_is_held_until_it_is_sent() -> None:
    with peers() as (a, b):
        for value in range(20):
            a.endpoint.send(b.id, [b"", bytearray([value]) * 1_000_000])
        gc.collect()
        for value, (_, frames) in enumerate(b.arrivals.wait_messages(20)):
            assert bytes(frames[1]) == bytes([value]) * 1_000_000
        b.arrivals.messages.clear()


def test_many_threads_send_at_once_and_each_keeps_its_order() -> None:
    threads_count, each = 8, 500
    with peers() as (a, b):
        barrier = threading.Barrier(threads_count)

        def send(thread: int) -> None:
            barrier.wait(WAIT_S)
            for number in range(each):
                large = [bytes([thread]) * 5000] if number % 50 == 0 else []
                a.endpoint.send(b.id, [bytes([thread]) + number.to_bytes(4, "little"), *large])

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(threads_count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        messages = b.arrivals.wait_messages(threads_count * each)
        for sender in range(threads_count):
            own = [bytes(frames[0][1:]) for _, frames in messages if frames[0][0] == sender]
            assert own == [number.to_bytes(4, "little") for number in range(each)]
        assert all(bytes(frames[1]) == bytes(frames[0][:1]) * 5000 for _, frames in messages if len(frames) > 1)
        b.arrivals.messages.clear()


def test_all_talk_to_all() -> None:
    with peers(6) as workers:
        for one in workers:
            for other in workers:
                one.endpoint.send(other.id, [one.id + other.id])
        for one in workers:
            came = one.arrivals.wait_messages(6)
            assert sorted(source for source, _ in came) == sorted(other.id for other in workers)
            assert all(frames == [source + one.id] for source, frames in came)


# ---- more than fits ------------------------------------------------------------------------------------------------


def test_a_receiver_that_starts_late_gets_every_message() -> None:
    count = 30_000
    with peers(start=False) as (a, b):
        a.start()
        for number in range(count):
            a.endpoint.send(b.id, numbered(number))
        b.start()
        assert [frames for _, frames in b.arrivals.wait_messages(count)] == [numbered(n) for n in range(count)]


def test_several_senders_fill_and_empty_the_queue_without_losing_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 50)
    threads_count, each = 4, 2_000
    with peers() as (a, b):

        def send(thread: int) -> None:
            for number in range(each):
                a.endpoint.send(b.id, [bytes([thread]) + number.to_bytes(4, "little")])

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(threads_count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        messages = b.arrivals.wait_messages(threads_count * each)
        for sender in range(threads_count):
            own = [bytes(frames[0][1:]) for _, frames in messages if frames[0][0] == sender]
            assert own == [number.to_bytes(4, "little") for number in range(each)]


def test_what_is_queued_at_the_close_is_still_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 5)
    with peers() as (a, b):
        for number in range(5_000):
            a.endpoint.send(b.id, numbered(number))
        a.endpoint.close(WAIT_S)
        assert [frames for _, frames in b.arrivals.wait_messages(5_000)] == [numbered(n) for n in range(5_000)]


def test_what_nobody_reads_is_given_up_at_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 5)
    with peers() as (a, b):
        with b.arrivals.stopped():
            for _ in range(1000):
                a.endpoint.send(b.id, [bytes(100_000)])
            assert a.endpoint.queued_nbytes(b.id)
            a.endpoint.close(0.05)
            assert not a.endpoint.queued_nbytes(b.id)
        b.arrivals.wait_messages(1)


# ---- peers that go ---------------------------------------------------------------------------------------------------


def test_sending_to_a_stranger_is_refused() -> None:
    with peers(1) as (a,), pytest.raises(PeerLostError, match="not connected"):
        a.endpoint.send(new_incarnation(), [b"x"])


@pytest.mark.parametrize("heard_of", ["send", "watch"])
def test_the_loss_of_a_peer_is_told_once(heard_of: str) -> None:
    with peers() as (a, b):
        if heard_of == "send":
            a.endpoint.send(b.id, [b"x"])
        else:
            a.endpoint.watch(b.id)
            a.endpoint.send(b.id, [b"x"])  # the connection is up when this has come
        b.arrivals.wait_messages(1)
        b.endpoint.close(0.0)
        assert a.arrivals.wait_lost() == [(b.id, broken())]
        with pytest.raises(PeerLostError, match=broken()):
            a.endpoint.send(b.id, [b"x"])
        a.endpoint.watch(b.id)
        assert a.arrivals.wait_lost(2)[1] == (b.id, broken())


def test_a_peer_that_nobody_listens_for_is_lost() -> None:
    with peers() as (a, b):
        b.endpoint.close(0.0)
        a.endpoint.send(b.id, [b"x"])
        assert a.arrivals.wait_lost() == [(b.id, "nobody listens at its address")]


def test_the_loss_of_one_peer_leaves_the_others_alone() -> None:
    with peers(3) as (a, b, c):
        for peer in (b, c):
            a.endpoint.send(peer.id, [b"x"])
            peer.arrivals.wait_messages(1)
        b.endpoint.close(0.0)
        a.arrivals.wait_lost()
        a.endpoint.send(c.id, [b"y"])
        c.arrivals.wait_messages(2)
        c.endpoint.send(a.id, [b"z"])
        assert a.arrivals.wait_messages(1) == [(c.id, [b"z"])]


def test_a_peer_that_said_goodbye_is_forgotten_with_its_monitor() -> None:
    with peers(3) as (a, b, c):
        for peer in (b, c):
            a.endpoint.send(peer.id, [b"x"])
            peer.arrivals.wait_messages(1)
        a.endpoint.disconnect(b.id)
        a.endpoint.disconnect(b.id)
        with pytest.raises(PeerLostError, match="it left the group"):
            a.endpoint.send(b.id, [b"x"])
        c.endpoint.close(0.0)
        assert a.arrivals.wait_lost() == [(c.id, broken())]
        until(lambda: not a.endpoint._watch._watched, "the monitors are closed")
        a.endpoint.watch(b.id)
        assert a.arrivals.wait_lost(2)[1] == (b.id, "it left the group")


def test_lost_peers_leave_no_files_open() -> None:
    with peers(1) as (a,):
        open_before = -1
        for count in range(1, 6):
            with peers(1) as (other,):
                a.knows(other)
                a.endpoint.send(other.id, [b"x"])
                other.arrivals.wait_messages(1)
            a.arrivals.wait_lost(count)
            if count == 1:
                until(lambda: not a.endpoint._watch._watched, "the first monitor is closed")
                open_before = len(os.listdir("/proc/self/fd"))
        until(lambda: len(os.listdir("/proc/self/fd")) <= open_before, "the sockets of the lost are closed")


def test_what_was_sent_before_a_goodbye_still_leaves() -> None:
    with peers(start=False) as (a, b):
        a.start()
        for number in range(100):
            a.endpoint.send(b.id, numbered(number))
        a.endpoint.disconnect(b.id)
        b.start()
        b.arrivals.wait_messages(100)


def test_a_peer_whose_address_is_none_is_lost() -> None:
    with peers(1) as (a,):
        for stranger, address in ((new_incarnation(), "tcp://no-such-host.invalid:5"), (new_incarnation(), "nonsense")):
            a.endpoint.connect(stranger, address)
            with pytest.raises(PeerLostError, match="its address cannot be used"):
                a.endpoint.send(stranger, [b"x"])
            a.endpoint.watch(stranger)
        assert [peer for peer, reason in a.arrivals.wait_lost(2) if "address" in reason] != []


def test_hundreds_of_departures_leave_a_bounded_memory() -> None:
    """A message to one of the last that left is refused with the reason; of those before nothing is kept."""
    with peers(1) as (a,):
        before = a.endpoint.remote_addresses()
        lives = [number.to_bytes(8, "big") for number in range(1, ENDED_MAX + 300)]
        for life in lives:
            a.endpoint.connect(life, "tcp://127.0.0.1:9")
            a.endpoint.disconnect(life)
        assert a.endpoint.remote_addresses() == before
        with pytest.raises(PeerLostError, match="it left the group"):
            a.endpoint.send(lives[-1], [b"x"])
        with pytest.raises(PeerLostError, match="it is not connected"):
            a.endpoint.send(lives[0], [b"x"])


def test_of_peers_that_are_lost_no_address_is_kept() -> None:
    """They died without a goodbye."""
    with peers(3) as (a, *others):
        for other in others:
            a.endpoint.send(other.id, [b"x"])
            other.arrivals.wait_messages(1)
            other.endpoint.close(0.0)
        a.arrivals.wait_lost(2)
        with pytest.raises(PeerLostError):
            a.endpoint.send(others[0].id, [b"x"])
        assert not a.endpoint.remote_addresses() & {sockets.split_address(other.endpoint.address) for other in others}


@pytest.mark.parametrize(("limit", "value"), [("MAX_QUEUED", 10), ("MAX_QUEUED_NBYTES", 95_000)])
def test_too_many_queued_messages_are_refused(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(sockets, "HIGH_WATER_MARK", 5)
    for module in (socket_link, local_link):
        monkeypatch.setattr(module, limit, value)
    with peers(start=False) as (a, b):

        def send_many() -> None:
            for _ in range(10_000):
                a.endpoint.send(b.id, [bytes(10_000)])

        with pytest.raises(
            OverloadedError, match=r"10 (messages|packets) of 100[01]\d\d bytes wait .* send fewer at once"
        ):
            send_many()
        a.start()
        b.start()
        b.arrivals.wait_messages(15)


# ---- closing -------------------------------------------------------------------------------------------------------


def test_close_is_idempotent_and_ends_everything() -> None:
    with peers() as (a, b):
        a.endpoint.send(b.id, [b"x"])
        b.arrivals.wait_messages(1)
        for _ in range(2):
            a.endpoint.close(0.0)
        with pytest.raises(AgentClosedError):
            a.endpoint.send(b.id, [b"x"])
        with pytest.raises(AgentClosedError):
            a.endpoint.watch(b.id)
        assert a.endpoint._context.closed


def test_an_endpoint_that_never_started_closes() -> None:
    with peers(1, start=False) as (a,):
        a.endpoint.close(1.0)
        assert a.endpoint._context.closed


def test_an_endpoint_may_be_closed_by_what_it_calls() -> None:
    closed = threading.Event()
    with peers() as (a, b):
        c = Peer()

        def close(*_: object) -> None:
            c.endpoint.close(0.0)
            closed.set()

        c.endpoint.start(close, close)
        a.knows(c)
        a.endpoint.send(c.id, [b"x"])
        assert closed.wait(WAIT_S)
        assert a.arrivals.wait_lost()[0][0] == c.id
        a.endpoint.send(b.id, [b"x"])
        b.arrivals.wait_messages(1)


def test_threads_that_send_while_it_closes_end_with_an_error() -> None:
    with peers() as (a, b):
        started = threading.Barrier(5)
        outcomes: list[Exception] = []

        def send() -> None:
            started.wait(WAIT_S)
            try:
                while True:
                    a.endpoint.send(b.id, [b"x"])
            except Exception as error:
                outcomes.append(error)

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait(WAIT_S)
        a.endpoint.close(0.0)
        for thread in threads:
            thread.join(WAIT_S)
        assert [type(error) for error in outcomes] == [AgentClosedError] * 4


def test_an_address_that_is_taken_leaves_nothing_behind() -> None:
    with peers(1) as (a,), pytest.raises(ConfigError, match="cannot listen on"):
        PeerEndpoint(new_incarnation(), a.endpoint.address)


def test_a_message_of_no_worker_does_no_harm() -> None:
    with peers() as (a, b):
        context = sockets.make_context()
        stranger = sockets.make_socket(context, zmq.DEALER)
        sockets.connect(stranger, a.endpoint.address, CREDENTIALS)
        stranger.send_multipart([b""])
        stranger.send_multipart([b"", b"", b""])
        b.endpoint.send(a.id, [b"x"])
        assert [frames for _, frames in a.arrivals.wait_messages(2) if frames == [b"x"]]
        stranger.close()
        context.term()


def test_loopback_is_the_default_of_the_tests() -> None:
    with peers(1) as (a,):
        assert a.endpoint.address.startswith(LOOPBACK[:-1])


def test_a_connection_that_comes_again_is_read_though_the_one_before_still_stands() -> None:
    source = new_incarnation()
    with peers(1) as (b,), sockets.make_context() as context:
        before, again = (sockets.make_socket(context, zmq.DEALER, identity=source) for _ in range(2))
        with before, again:
            sockets.connect(before, b.endpoint.address, CREDENTIALS)
            before.send(b"before")
            assert b.arrivals.wait_messages(1) == [(source, [b"before"])]
            sockets.connect(again, b.endpoint.address, CREDENTIALS)
            again.send(b"again")
            assert b.arrivals.wait_messages(2)[1:] == [(source, [b"again"])]


# ---- what is called back fails --------------------------------------------------------------------------------------


def test_a_loss_that_could_not_be_acted_on_keeps_no_later_one_from_being_told() -> None:
    """What is called for the first loss raises."""
    with peers(3, start=False) as (a, b, c):
        told: list[Incarnation] = []

        def on_lost(peer: Incarnation, reason: str) -> None:
            told.append(peer)
            if len(told) == 1:
                raise OSError("Expected error")

        a.endpoint.start(a.arrivals.on_frames, on_lost)
        for number, peer in enumerate((b, c), 1):
            peer.start()
            a.endpoint.send(peer.id, [b"x"])
            peer.arrivals.wait_messages(1)
            peer.endpoint.close(0.0)
            until(lambda number=number: len(told) == number, "the loss is told")  # type: ignore[misc]
        assert told == [b.id, c.id]


def test_a_message_that_could_not_be_taken_keeps_no_later_one_from_being_read() -> None:
    """What is called for the first message raises."""
    with peers(start=False) as (a, b):
        came: list[bytes] = []

        def on_frames(_: Incarnation, frames: list[Buffer]) -> None:
            came.append(bytes(frames[0]))
            if len(came) == 1:
                raise OSError("Expected error")

        b.endpoint.start(on_frames, b.arrivals.on_lost)
        a.start()
        for number in range(2):
            a.endpoint.send(b.id, numbered(number))
            until(lambda number=number: len(came) > number, "it has come")  # type: ignore[misc]
        assert came == [numbered(0)[0], numbered(1)[0]]
