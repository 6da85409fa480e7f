"""Messages as packets: whole, in order, of every size, with the files that go with them. Real sockets and files."""

from __future__ import annotations

import fcntl
import gc
import linecache
import logging
import os
import random
import resource
import socket
import struct
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zrpc import finalizers
from zrpc.errors import ProtocolError
from zrpc.transport import descriptors, packets
from zrpc.transport.packets import FILES_MAX, MAX_NBYTES, Bundle, Incoming, OwnedFile, cut, is_whole
from zrpc.wire.envelope import INLINE_MAX_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zrpc.wire.envelope import Buffer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="such sockets are Linux's")

EDGES = [0, 1, 2, 15, 16, 17, INLINE_MAX_NBYTES, INLINE_MAX_NBYTES + 1]
EDGES += [MAX_NBYTES + more for more in range(-70, 3)]
EDGES += [2 * MAX_NBYTES + more for more in (-1, 0, 1)]
"""Sizes about which something changes: the padding, the packet with its header and table, the kind of the frame."""
STARTS = [b"", b"\xc1", b"\xc1\x00", b"\xc1\x0f", b"\xc1\x10", b"\xc1\x11", b"\xc1\x12", b"\xc1\xff", b"zrpc"]
"""What frames begin with: packets of the module's own begin so as well."""


class Wire:
    """Both ends of a connection."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (self.near, self.far):
            sock.setblocking(False)
        self.incoming = Incoming(self.far)
        self.came: list[list[Buffer]] = []

    def receive_all(self) -> None:
        """Receive what there is."""
        while message := self.incoming.receive():
            self.came.append(message)

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send a message; what came is received where there is no room for more."""
        for packet in cut(frames):
            while True:
                try:
                    packet.send(self.near)
                    break
                except BlockingIOError:
                    self.receive_all()

    def exchange(self, *messages: Sequence[Buffer]) -> list[list[Buffer]]:
        """Send messages, and receive all that come."""
        for frames in messages:
            self.send(frames)
        self.receive_all()
        came, self.came = self.came, []
        return came


@contextmanager
def connected() -> Iterator[Wire]:
    wire = Wire()
    with wire.near, wire.far:
        yield wire


def as_bytes(messages: Sequence[Sequence[Buffer]]) -> list[list[bytes]]:
    return [[bytes(frame) for frame in frames] for frames in messages]


def make_frame(nbytes: int, start: bytes, seed: int) -> bytes:
    return (start + random.Random(seed).randbytes(nbytes))[:nbytes]


@contextmanager
def few_files(spare: int) -> Iterator[None]:
    """This process may open `spare` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    gaps = [os.dup(0)]
    while gaps[-1] <= highest:
        gaps.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (gaps[-1] + 1 + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in gaps:
            os.close(fd)


# ---- frames ----------------------------------------------------------------------------------------------------------

frames_of_messages = st.lists(
    st.tuples(
        st.sampled_from(EDGES) | st.integers(0, 3 * MAX_NBYTES),
        st.sampled_from(STARTS),
        st.integers(0, 1 << 30),
        st.sampled_from([bytes, bytearray, memoryview]),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(st.lists(frames_of_messages, max_size=5))
def test_messages_of_every_size_come_whole_and_in_order(described: list[list[tuple[int, bytes, int, Any]]]) -> None:
    """Whatever their frames begin with, also as the module's own packets do."""
    messages = [[make_frame(nbytes, start, seed) for nbytes, start, seed, _ in message] for message in described]
    given_as = [
        [kind(frame) for frame, (*_, kind) in zip(frames, message, strict=True)]
        for frames, message in zip(messages, described, strict=True)
    ]
    with connected() as wire:
        assert as_bytes(wire.exchange(*given_as)) == messages


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [1, 2])
def test_sizes_about_the_limits_of_a_packet_come_whole(start: bytes, count: int) -> None:
    """Every size near one packet, alone and with another frame."""
    with connected() as wire:
        messages = [[make_frame(nbytes, start, nbytes)] * count for nbytes in EDGES]
        assert as_bytes(wire.exchange(*messages)) == messages


@pytest.mark.parametrize("first", range(256))
def test_a_single_byte_comes_whichever_it_is(first: int) -> None:
    """Alone, and as the first of two."""
    with connected() as wire:
        messages = [[bytes([first])], [bytes([first, 0x12])], [b"after"]]
        assert as_bytes(wire.exchange(*messages)) == messages


@pytest.mark.parametrize("nbytes", [5_000_000, 20_000_003])
def test_a_message_of_megabytes_comes_whole(nbytes: int) -> None:
    """Its packets are more than the kernel holds."""
    pattern = random.Random(nbytes).randbytes(nbytes)
    with connected() as wire:
        assert as_bytes(wire.exchange([b"head", pattern, b"tail"], [b"next"])) == [
            [b"head", pattern, b"tail"],
            [b"next"],
        ]


@pytest.mark.parametrize("nbytes", [0, 1, 16, 100, 5000])
@pytest.mark.parametrize("count", [2, 511, 512, 1022, 1023, 1024, 1025, 3000, 20_000])
def test_a_message_of_many_frames_comes_whole(count: int, nbytes: int) -> None:
    """They are more than the kernel takes in one go (IOV_MAX)."""
    if count * nbytes > 20_000_000:
        count = 20_000_000 // nbytes
    frames = [make_frame(nbytes, b"", seed) for seed in range(count)]
    with connected() as wire:
        assert as_bytes(wire.exchange(frames, [b"next"])) == [frames, [b"next"]]


def test_large_frames_are_sent_without_a_copy() -> None:
    """The pieces of their packets lie in the memory of the frame."""
    memory = bytearray(3 * MAX_NBYTES)
    views = [piece for packet in cut([b"head", memory]) for piece in packet.pieces if isinstance(piece, memoryview)]
    assert sum(view.nbytes for view in views if view.obj is memory) == len(memory)


def test_no_packet_is_larger_than_its_limit() -> None:
    """Whatever is cut."""
    for nbytes in EDGES:
        for frames in ([bytes(nbytes)], [b"head", bytes(nbytes)], [bytes(nbytes)] * 3):
            assert all(0 < packet.nbytes <= MAX_NBYTES for packet in cut(frames))


def test_a_small_frame_alone_is_one_packet_as_it_is() -> None:
    """So it costs nothing to cut it."""
    assert is_whole([b"x"])
    assert is_whole([bytes(MAX_NBYTES)])
    assert [packet.pieces for packet in cut([b"x"])] == [[b"x"]]
    for frames in ([b""], [bytes(MAX_NBYTES + 1)], [b"a", b"b"], [b"\xc1\x12"], [b"\xc1"], Bundle([b"x"], [])):
        assert not is_whole(frames)


def test_large_frames_are_writable_and_small_ones_are_bytes() -> None:
    """Tensors take over the large ones."""
    with connected() as wire:
        sizes = [INLINE_MAX_NBYTES, INLINE_MAX_NBYTES + 1, 1_000_000]
        frames: list[Any] = wire.exchange([bytes(nbytes) for nbytes in sizes])[0]
        assert [type(frame) for frame in frames] == [bytes, memoryview, memoryview]
        for frame in frames[1:]:
            frame[0] = 77
            assert frame[0] == 77


def test_it_says_that_a_message_has_not_come_yet() -> None:
    """One packet of several has come."""
    with connected() as wire:
        assert wire.incoming.receive() is None
        first, *rest = cut([bytes(3 * MAX_NBYTES)])
        first.send(wire.near)
        assert wire.incoming.receive() is None
        for packet in rest:
            packet.send(wire.near)
        assert as_bytes([wire.incoming.receive() or []]) == [[bytes(3 * MAX_NBYTES)]]


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_it_says_that_no_more_will_come(begun: int) -> None:
    """The sender has closed its end, maybe in the middle of a message; what was whole before comes first."""
    with connected() as wire:
        wire.send([b"whole"])
        for packet in cut([bytes(3 * MAX_NBYTES)])[:begun]:
            packet.send(wire.near)
        wire.near.close()
        assert wire.incoming.receive() == [b"whole"]
        assert wire.incoming.receive() == []


@pytest.mark.parametrize("frames", [[], Bundle([], [])])
def test_a_message_without_frames_is_not_sent(frames: list[Buffer]) -> None:
    """It would look like the end of the connection."""
    with connected() as wire:
        wire.send(frames)
        wire.send([b"next"])
        assert wire.incoming.receive() == [b"next"]


# ---- a destructor that receives --------------------------------------------------------------------------------------


REENTRANT = [[b"a"], [b"b", b"2"], [b"c", bytes(2 * MAX_NBYTES)], [b"d", b"", bytes(MAX_NBYTES)], [b"e"]]


class Disturbed:
    """A socket where `disturb()` is called once, before packet number `at` is taken: as a destructor would be."""

    def __init__(self, sock: socket.socket, at: int, disturb: Callable[[], None]) -> None:
        self._sock = sock
        self._at = at
        self._disturb = disturb

    def _count(self) -> None:
        self._at -= 1
        if self._at == -1:
            self._disturb()

    def recv(self, *args: Any) -> Any:
        self._count()
        return self._sock.recv(*args)

    def recv_into(self, *args: Any) -> Any:
        self._count()
        return self._sock.recv_into(*args)

    def recvmsg(self, *args: Any) -> Any:
        self._count()
        return self._sock.recvmsg(*args)


@pytest.mark.parametrize("nested", [1, 2, 5])
def test_messages_come_whole_though_a_destructor_receives_in_the_middle(nested: int) -> None:
    """It runs where memory is made, at whichever packet, and waits for an answer there."""
    for at in range(sum(len(cut(frames)) for frames in REENTRANT) + 1):
        with connected() as wire:
            wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for frames in REENTRANT:
                wire.send(frames)

            def receive(wire: Wire = wire) -> None:
                if message := wire.incoming.receive():
                    wire.came.append(message)

            def disturb(receive: Callable[[], None] = receive) -> None:
                for _ in range(nested):
                    receive()

            wire.incoming.sock = Disturbed(wire.far, at, disturb)  # type: ignore[assignment]
            for _ in range(2 * len(REENTRANT)):
                receive()
            assert sorted(as_bytes(wire.came)) == REENTRANT, f"disturbed at packet {at}"


@pytest.mark.parametrize("nested", [1, 5])
def test_messages_come_whole_though_a_destructor_receives_between_two_lines(nested: int) -> None:
    """From Python 3.12 on it may run after any call, so between almost any two."""
    at, reached = 0, True
    while reached:
        with connected() as wire:
            wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            for frames in REENTRANT:
                wire.send(frames)
            left = at

            def receive(wire: Wire = wire) -> None:
                if message := wire.incoming.receive():
                    wire.came.append(message)

            def trace(frame: Any, event: str, _: object, receive: Callable[[], None] = receive) -> Any:
                nonlocal left
                if frame.f_code.co_filename != packets.__file__:
                    return None
                if event == "line" and "nothing runs before this" not in linecache.getline(
                    packets.__file__, frame.f_lineno
                ):
                    left -= 1
                    if left == -1:
                        sys.settrace(None)
                        for _ in range(nested):
                            receive()
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                for _ in range(2 * len(REENTRANT)):
                    receive()
            finally:
                sys.settrace(before)
            reached = left < 0
            assert sorted(as_bytes(wire.came)) == REENTRANT, f"disturbed at line event {at}"
        at += 1


# ---- files -----------------------------------------------------------------------------------------------------------


def make_files(count: int) -> list[OwnedFile]:
    """Files that each hold their number."""
    files = []
    for number in range(count):
        files.append(OwnedFile(os.memfd_create("zrpc-test")))
        os.pwrite(files[-1].fd, number.to_bytes(4, "little"), 0)
    return files


def number_in(file: OwnedFile | None) -> int:
    assert file is not None
    return int.from_bytes(os.pread(file.fd, 4, 0), "little")


def files_of(message: list[Buffer]) -> Sequence[Any]:
    assert isinstance(message, Bundle)
    return message.files


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("count", [1, 2, FILES_MAX - 1, FILES_MAX, FILES_MAX + 1, 2 * FILES_MAX + 1])
def test_files_come_with_their_message_open_and_each_once(count: int) -> None:
    """Also more of them than one packet carries."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < 2 * count + 200:
        pytest.skip("this process may not open so many files")
    files = make_files(count)
    with connected() as wire:
        (message,) = wire.exchange(Bundle([b"head", b"body"], files))
        assert as_bytes([message]) == [[b"head", b"body"]]
        came = files_of(message)
        assert [number_in(file) for file in came] == list(range(count))
        fds = {file.fd for file in came}
        assert len(fds) == count
        assert not fds & {file.fd for file in files}


def test_files_come_with_the_message_that_they_were_sent_with() -> None:
    """Before and after it come others, without and with files."""
    files = make_files(3)
    sent = [
        [b"none"],
        Bundle([b"one"], files[:1]),
        [b"none", b"again"],
        Bundle([b"two", bytes(3 * MAX_NBYTES)], files[1:]),
        [b"end"],
    ]
    with connected() as wire:
        came = wire.exchange(*sent)
        assert as_bytes(came) == as_bytes(sent)
        numbers = [[number_in(file) for file in getattr(message, "files", ())] for message in came]
        assert numbers == [[], [0], [], [1, 2], []]


def test_files_that_came_are_closed_in_programs_that_are_started() -> None:
    """They are none of theirs."""
    with connected() as wire:
        (message,) = wire.exchange(Bundle([b"x"], make_files(3)))
        assert all(fcntl.fcntl(file.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for file in files_of(message))


def test_files_are_closed_with_the_message() -> None:
    """Those that came, when it is dropped; those that were sent, when it is dropped where it was sent."""
    with connected() as wire:
        files = make_files(FILES_MAX + 10)
        sent = [file.fd for file in files]
        (message,) = wire.exchange(Bundle([b"x"], files))
        assert all(map(is_open, sent)), "the sender decides"
        del files
        assert not any(map(is_open, sent))
        came = [file.fd for file in files_of(message)]
        kept = files_of(message)[0]
        del message
        gc.collect()
        assert [fd for fd in came if is_open(fd)] == [kept.fd]


@pytest.mark.parametrize("num_packets", [1, 2, 3, 4, 5, 6])
def test_files_of_a_message_that_does_not_come_whole_are_closed(num_packets: int) -> None:
    """Its sender has closed the connection in the middle of it."""
    before = descriptors.count_open()
    with connected() as wire:
        for packet in cut(Bundle([bytes(2 * MAX_NBYTES)], make_files(FILES_MAX + 1)))[:num_packets]:
            packet.send(wire.near)
        del packet
        wire.near.close()
        assert wire.incoming.receive() == []
        wire.incoming.close()
    del wire
    gc.collect()
    assert descriptors.count_open() == before


def test_files_that_cannot_be_opened_are_missed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The message comes all the same, with None in place of each of them, and what follows it."""
    with connected() as wire:
        wire.send(Bundle([b"x"], make_files(20)))
        wire.send([b"next"])
        with caplog.at_level(logging.WARNING, "zrpc"), few_files(5):
            wire.receive_all()
        assert as_bytes(wire.came) == [[b"x"], [b"next"]]
        came = files_of(wire.came[0])
        num_open = sum(file is not None for file in came)
        assert 0 < num_open <= 5
        assert [number_in(file) for file in came[:num_open]] == list(range(num_open))
        assert set(came[num_open:]) == {None}
        assert len(came) >= 20
        with caplog.at_level(logging.WARNING, "zrpc"):
            finalizers.run_pending()
    assert [record.getMessage()[:30] for record in caplog.records] == ["files of a message did not com"]


def test_files_that_cannot_be_opened_leave_the_others_in_their_places(caplog: pytest.LogCaptureFixture) -> None:
    """A message has more files than a packet; the first packet's come when there is room for none, the second's all."""
    with connected() as wire, caplog.at_level(logging.ERROR, "zrpc"):
        packets = cut(Bundle([b"x", b"y"], make_files(FILES_MAX + 3)))
        for packet in packets[:2]:
            packet.send(wire.near)
        with few_files(0):
            assert wire.incoming.receive() is None
        for packet in packets[2:]:
            packet.send(wire.near)
        wire.receive_all()
        came = files_of(wire.came[0])
        assert came[:FILES_MAX] == [None] * FILES_MAX
        assert [number_in(file) for file in came[FILES_MAX:]] == [FILES_MAX, FILES_MAX + 1, FILES_MAX + 2]
        finalizers.run_pending()


# ---- what is no message ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        b"\xc1",
        b"\xc1\x13",
        b"\xc1\xff and more",
        b"\xc1\x12",
        b"\xc1\x12 short",
        struct.pack("<2s2xIQ", b"\xc1\x12", 2, 15),
        struct.pack("<2s2xIQ", b"\xc1\x12", 0, (1 << 40) + 1),
        struct.pack("<2s2xIQ", b"\xc1\x12", 0, (1 << 64) - 1),
        struct.pack("<2s2xIQQ", b"\xc1\x12", 1, 16, 0) + bytes(24),
        struct.pack("<2s2xIQQQ", b"\xc1\x12", 1, 16, 1, 0),
        struct.pack("<2s2xIQQQ", b"\xc1\x12", 1, 16, (1 << 64) - 1, 0),
    ],
)
def test_what_is_no_packet_is_refused(packet: bytes) -> None:
    """A worker of another version sends it, say."""
    with connected() as wire:
        wire.near.send(packet)
        with pytest.raises(ProtocolError):
            wire.incoming.receive()


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.binary(min_size=1, max_size=60)
        | st.builds(lambda start, rest: start + rest, st.sampled_from(STARTS[1:]), st.binary(max_size=60))
        | st.builds(
            lambda count, nbytes, rest: struct.pack("<2s2xIQ", b"\xc1\x12", count, nbytes) + rest,
            st.integers(0, 4),
            st.integers(0, 80),
            st.binary(max_size=60),
        ),
        max_size=6,
    )
)
def test_whatever_comes_is_a_message_or_refused(sent: list[bytes]) -> None:
    """Nothing else is raised."""
    with connected() as wire:
        for packet in sent:
            wire.near.send(packet)
        wire.near.close()
        with suppress(ProtocolError):
            wire.receive_all()


def test_a_file_packet_that_carries_none_does_no_harm() -> None:
    """Its message comes without files."""
    with connected() as wire:
        wire.near.send(b"\xc1\x10")
        wire.near.send(b"\xc1\x11")
        wire.send([b"a", b"b"])
        wire.receive_all()
        assert wire.came == [[b"a", b"b"]]
        assert type(wire.came[0]) is list


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([struct.pack("<2s2xIQ", b"\xc1\x12", 0, 0)], "a message of 0 frames"),
        ([struct.pack("<2s2xIQ", b"\xc1\x12", 1, 1 << 30)], "is not the last"),
        ([struct.pack("<2s2xIQ", b"\xc1\x12", 1, 1 << 30) + bytes(65_520), b"x"], "is not the last"),
        ([struct.pack("<2s2xIQ", b"\xc1\x12", 1 << 20, 16)], "a message of 1048576 frames"),
    ],
)
def test_a_message_in_packets_that_none_would_send_is_refused(sent: list[bytes], words: str) -> None:
    """Of no frames, or in many small packets, which take many times their size until it is whole."""
    with connected() as wire:
        for packet in sent:
            wire.near.send(packet)
        with pytest.raises(ProtocolError, match=words):
            wire.incoming.receive()
        wire.incoming.close()
