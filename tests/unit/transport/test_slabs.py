"""Shared memory: what is placed is found, is its receiver's alone, and comes back when nobody sees it any more."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from tests.unit.transport.slab_messages import A, B, C, Told, begin, copies, fetch, place, placed, share
from tests.unit.wire.travel import travel
from zrpc import finalizers
from zrpc.errors import DeviceError, LimitError, ProtocolError
from zrpc.transport import allowance, slab, slabs
from zrpc.transport.attachments import Attachments
from zrpc.transport.copying import Copier
from zrpc.transport.filling import MAX_NBYTES
from zrpc.transport.packets import OwnedFile
from zrpc.transport.slab import FILE, HANDED_BACK, MAX_SLOTS, NBYTES, NO_FILE, NO_SLOT, NUMBER, SLOT, size_class
from zrpc.transport.slabs import MIN_NBYTES, SlabPool
from zrpc.wire import pickling
from zrpc.wire.envelope import Arriving, decode, encode
from zrpc.wire.messages import Reply
from zrpc.wire.payload import open_payload, seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.transport.filling import Fill

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")

PATIENCE_S = 30.0


@contextmanager
def pool(max_nbytes: int = 1 << 30, max_count: int = 1000) -> Iterator[SlabPool]:
    made = SlabPool(max_nbytes, max_count)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def attachments() -> Iterator[Attachments]:
    made = Attachments()
    yield made
    made.close()


@pytest.fixture
def others() -> Iterator[Attachments]:
    """Those of a second receiver."""
    made = Attachments()
    yield made
    made.close()


def answer(monkeypatch: pytest.MonkeyPatch, available_nbytes: Callable[[], int | None]) -> None:
    """Let the system say so of its memory."""
    monkeypatch.setattr(allowance, "available_nbytes", available_nbytes)


def buffer(nbytes: int, seed: int = 0) -> memoryview:
    return ((np.arange(nbytes) + seed) % 251).astype(np.uint8).data


@pytest.mark.parametrize("nbytes", [MIN_NBYTES, MIN_NBYTES + 1, 1_000_003])
def test_what_is_placed_is_found_and_writable(attachments: Attachments, nbytes: int) -> None:
    with pool() as sender:
        original = bytearray(buffer(nbytes))
        received = fetch(attachments, place(sender, memoryview(original)))
        original[:] = bytes(nbytes)  # the sender may write to it as soon as it is placed
        assert received == buffer(nbytes)
        received[0] = 77
        assert received[0] == 77
        assert original[0] == 0


def test_smaller_buffers_are_left_to_travel_as_frames() -> None:
    with pool() as sender:
        assert placed(sender, bytes(MIN_NBYTES - 1)) is None
        assert sender.counts() == {"slabs": 0, "held": 0, "nbytes": 0, "placed": 0}


def test_a_slab_is_used_again_once_nobody_sees_it(attachments: Attachments) -> None:
    with pool() as sender:
        first = place(sender, buffer(100_000))
        received = fetch(attachments, first)
        second = place(sender, buffer(100_000, 1))
        assert second.number != first.number, "the first is held"
        part = received[10:20]
        del received
        assert place(sender, buffer(100_000, 2)).number not in (first.number, second.number), (
            "a part of the first is held"
        )
        assert part == buffer(100_000)[10:20]
        del part
        gc.collect()
        again = place(sender, buffer(100_000, 3))
        assert again.number == first.number
        assert fetch(attachments, again) == buffer(100_000, 3)


def test_tensors_live_in_slabs_and_give_them_back() -> None:
    attachments = Attachments()
    with pool() as sender:
        value: dict[str, Any] = {
            "weights": torch.randn(300, 300),
            "array": np.random.default_rng(0).random(20_000),
            "small": [1, 2],
        }
        payload = pickling.dumps(value)
        later: list[Fill] = []
        files: list[OwnedFile] = []
        frames = encode(seal(Reply(), 1, payload, None), lambda raw: sender.place(B, raw, later, files))
        sender.fill(later)
        assert (len(frames), len(files)) == (1, 2)
        came = decode(frames, lambda descriptor: attachments.fetch(A, descriptor, [], files))
        after = pickling.loads(open_payload(came))
        del came
        assert torch.equal(after["weights"], value["weights"])
        assert np.array_equal(after["array"], value["array"])
        after["weights"].zero_()
        after["array"][:] = 0
        assert value["weights"].any()
        assert sender.counts()["held"] == 2
        row = after["weights"][5]
        del after
        gc.collect()
        assert sender.counts()["held"] == 1, "a row of the tensor is seen"
        assert torch.equal(travel(pickling.dumps(row)).tensors[0], torch.zeros(300))
        del row
        gc.collect()
        assert sender.counts()["held"] == 0
    attachments.close()


def test_what_a_lost_holder_held_is_never_filled_again(attachments: Attachments) -> None:
    with pool() as sender:
        held = place(sender, buffer(100_000), holder=A)
        other = place(sender, buffer(100_000, 1), holder=B)
        received = fetch(attachments, held, B)
        sender.reclaim(A)
        numbers = {place(sender, buffer(100_000, seed)).number for seed in range(3)}
        assert held.number not in numbers
        assert other.number not in numbers
        assert received == buffer(100_000), "should it live after all, what it maps stays as it is"
        del received
        gc.collect()
        assert place(sender, buffer(100_000)).number != held.number


def test_no_more_is_taken_than_allowed(attachments: Attachments, caplog: pytest.LogCaptureFixture) -> None:
    room = size_class(100_000)
    with pool(max_nbytes=2 * room) as sender:
        first, second = (place(sender, buffer(100_000, seed)) for seed in (1, 2))
        for _ in range(3):
            assert placed(sender, buffer(100_000)) is None
        finalizers.run_pending()
        assert caplog.text.count("shared memory is not used for now") == 1
        del second
        received = fetch(attachments, first)
        del received
        gc.collect()
        place(sender, buffer(MIN_NBYTES))  # of another size: the free one is given up for it
        assert sender.counts()["nbytes"] <= 2 * room


def test_a_buffer_that_is_too_large_for_all_shared_memory_goes_through_sockets(
    attachments: Attachments, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says that, once, and not that anything is held; slabs of other buffers stay, and are used."""
    with pool(max_nbytes=4 << 20) as sender:
        told = place(sender, buffer(1 << 20))
        fetch(attachments, told)
        for _ in range(3):
            assert placed(sender, bytes(5 << 20)) is None
        assert place(sender, buffer(1 << 20)).number == told.number
        finalizers.run_pending()
        (record,) = caplog.records
        assert record.getMessage() == (
            "a buffer of 5 MiB goes through sockets: all shared memory of this worker may be 4 MiB"
        )
        assert placed(sender, bytes(4 << 20)) is None
        finalizers.run_pending()
        assert "1 slabs of 1 MiB in all are held, and there may be 1000 of 4 MiB" in caplog.text


def test_without_memory_files_sockets_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with pool() as sender:
        monkeypatch.setattr(os, "memfd_create", fail)
        assert placed(sender, buffer(100_000)) is None
        finalizers.run_pending()
        assert "Too many open files" in caplog.text


def test_a_closed_pool_takes_nothing() -> None:
    with pool() as sender:
        place(sender, buffer(100_000))
        sender.close()
        sender.close()
        assert placed(sender, buffer(100_000)) is None


def test_slabs_of_a_closed_sender_stay_where_they_are_mapped(attachments: Attachments) -> None:
    with pool() as sender:
        received = fetch(attachments, place(sender, buffer(100_000)))
    assert received == buffer(100_000)
    attachments.forget(A)
    attachments.close()
    assert received == buffer(100_000)


@given(st.integers(MIN_NBYTES, 1 << 40))
def test_size_classes_waste_a_quarter_at_most(nbytes: int) -> None:
    room = size_class(nbytes)
    assert nbytes <= room <= nbytes * 5 // 4 + 4096
    assert room % 4096 == 0
    assert size_class(room) == room


def test_the_slab_used_last_is_used_next(attachments: Attachments) -> None:
    with pool() as sender:
        descriptors = [place(sender, buffer(100_000, seed)) for seed in range(3)]
        received = [fetch(attachments, descriptor) for descriptor in descriptors]
        del received[2]
        gc.collect()
        again = place(sender, buffer(100_000))
        assert again.number == descriptors[2].number, "the last one placed is free again"
        del received[0]
        gc.collect()
        assert place(sender, buffer(100_000)).number == descriptors[0].number
        assert sender.counts()["slabs"] == 3


def test_free_slabs_are_found_behind_many_held_ones(attachments: Attachments) -> None:
    with pool() as sender:
        received = [fetch(attachments, place(sender, buffer(MIN_NBYTES, seed))) for seed in range(200)]
        del received[::2]
        gc.collect()
        received += [fetch(attachments, place(sender, buffer(MIN_NBYTES, seed))) for seed in range(100)]
        assert sender.counts()["slabs"] < 200 + 20
        for seed, kept in zip([*range(1, 200, 2), *range(100)], received, strict=True):
            assert kept == buffer(MIN_NBYTES, seed)


def test_a_limit_is_no_reason_to_miss_a_free_slab(attachments: Attachments) -> None:
    room = size_class(MIN_NBYTES)
    with pool(max_nbytes=100 * room) as sender:
        received = [fetch(attachments, place(sender, buffer(MIN_NBYTES, seed))) for seed in range(100)]
        assert placed(sender, buffer(MIN_NBYTES)) is None
        del received[50]
        gc.collect()
        assert any(placed(sender, buffer(MIN_NBYTES)) is not None for _ in range(100 // 16 + 1))


def test_no_more_files_are_open_than_allowed(attachments: Attachments, caplog: pytest.LogCaptureFixture) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pool(max_count=20) as sender:
        received = [fetch(attachments, place(sender, buffer(MIN_NBYTES))) for _ in range(20)]
        assert len(os.listdir("/proc/self/fd")) == before + 20, "mappings need no file"
        assert placed(sender, buffer(MIN_NBYTES)) is None
        finalizers.run_pending()
        assert "there may be 20 of" in caplog.text
        del received[7]
        gc.collect()
        larger = [placed(sender, buffer(3 * MIN_NBYTES)) is not None for _ in range(3)]
        assert any(larger), "a free one of another size is given up for it"
        assert sender.counts()["slabs"] == 20
    assert len(os.listdir("/proc/self/fd")) == before


def test_slabs_leave_files_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, count in (
        (1024, 256),
        (1 << 20, allowance.POOL_MAX_COUNT),
        (resource.RLIM_INFINITY, allowance.POOL_MAX_COUNT),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert allowance.limits()[1] == count


def test_what_nobody_was_told_of_is_free_again(attachments: Attachments) -> None:
    with pool() as sender:
        first = place(sender, buffer(100_000))
        sender.take_back(first.descriptor)
        assert sender.counts()["held"] == 0
        assert fetch(attachments, place(sender, buffer(100_000, 1))) == buffer(100_000, 1)
        assert sender.counts()["slabs"] == 1


def test_a_slab_whose_filling_is_interrupted_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pool() as sender:
        first = place(sender, buffer(MAX_NBYTES + 1))
        sender.take_back(first.descriptor)
        with monkeypatch.context() as patched:
            patched.setattr(Copier, "copy", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sender.place(B, buffer(MAX_NBYTES + 1), [])
        assert sender.counts() == {"slabs": 0, "held": 0, "nbytes": 0, "placed": 2}
        assert place(sender, buffer(MAX_NBYTES + 1)).number != first.number


def test_a_slab_is_not_made_of_memory_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    available = allowance.RESERVE_NBYTES + (1 << 20)
    answer(monkeypatch, lambda: available)
    assert allowance.limits()[0] == available // 4
    with pool() as sender:
        for _ in range(allowance.REFUSALS + 1):
            assert placed(sender, bytes(600_000)) is None
        finalizers.run_pending()
        assert caplog.text.count(f"is too much where {available} bytes are available") == 1
        assert placed(sender, bytes(400_000)) is not None
        assert placed(sender, bytes(400_000)) is not None, "it is asked again, and there is as much as before"


def test_slabs_leave_some_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool() as sender:
        total = allowance.RESERVE_NBYTES + (64 << 20)
        answer(monkeypatch, lambda: total - sender._nbytes)
        while placed(sender, bytes(2_000_000)) is not None:
            assert sender.counts()["nbytes"] < 64 << 20
        assert sender.counts()["nbytes"] > 32 << 20


def test_where_the_system_says_nothing_of_its_memory_the_pool_has_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lambda: None)
    assert allowance.limits()[0] == allowance.POOL_MAX_NBYTES
    with pool() as sender:
        assert placed(sender, bytes(600_000)) is not None


# ---- memory that is given back -------------------------------------------------------------------------------------


def num_mapped() -> int:
    """How many mappings of slabs this process has; a `PrivateSlab` is two."""
    return sum("/memfd:zrpc-slab" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets an entry for each slab that is made."""
    names: list[str] = []
    make = os.memfd_create

    def record(name: str, flags: int) -> int:
        names.append(name)
        return make(name, flags)

    monkeypatch.setattr(os, "memfd_create", record)
    return names


def test_slabs_that_were_not_used_since_the_last_look_are_given_back(attachments: Attachments) -> None:
    """All of them after a burst, at the receiver too, with their files."""
    mapped, opened = num_mapped(), num_open()
    with pool() as sender:
        received = [fetch(attachments, place(sender, buffer(100_000 + 50_000 * (seed % 3)))) for seed in range(30)]
        received.clear()
        sender.trim()
        attachments.trim()
        assert sender.counts()["slabs"] == 30, "all were used since the last look, of which there was none"
        sender.trim()
        assert sender.counts() == {"slabs": 0, "held": 0, "nbytes": 0, "placed": 30}
        assert num_open() == opened
        assert num_mapped() == mapped + 30, "the receiver has not looked yet"
        attachments.trim()
        assert num_mapped() == mapped
        assert fetch(attachments, place(sender, buffer(100_000))) == buffer(100_000)


@pytest.mark.parametrize("nbytes", [MIN_NBYTES, 16_000_000])
@pytest.mark.parametrize("num_held", [0, 1, 2])
def test_what_is_used_between_looks_is_never_given_back(
    attachments: Attachments, made: list[str], nbytes: int, num_held: int
) -> None:
    """Calls that follow each other make no slab but the first ones, however often is looked."""
    raw = buffer(nbytes)
    with pool() as sender:
        held: list[memoryview] = []
        for _ in range(20):
            for _ in range(num_held + 1):
                held.append(fetch(attachments, place(sender, raw)))
                del held[: len(held) - num_held]
            sender.trim()
            attachments.trim()
        assert len(made) == num_held + 1


def test_what_is_shared_between_looks_is_never_given_back(
    attachments: Attachments, others: Attachments, made: list[str]
) -> None:
    """The same, where each slab goes to several workers."""
    with pool() as sender:
        for seed in range(20):
            told = share(sender, buffer(100_000, seed))
            assert fetch(attachments, told[B]) == fetch(others, told[C]) == buffer(100_000, seed)
            for one in (sender, attachments, others):
                one.trim()
        assert len(made) == 1


def test_only_as_many_slabs_are_kept_as_are_in_use_at_once(attachments: Attachments) -> None:
    """After a burst of calls at once that go on one by one."""
    with pool() as sender:
        received = [fetch(attachments, place(sender, buffer(100_000))) for _ in range(20)]
        received.clear()
        for _ in range(2):
            sender.trim()
            fetch(attachments, place(sender, buffer(100_000)))
        assert sender.counts()["slabs"] == 1


def test_what_is_held_is_given_back_when_it_is_free(attachments: Attachments) -> None:
    """However often is looked before: what a receiver keeps stays as it is."""
    with pool() as sender:
        received = fetch(attachments, place(sender, buffer(100_000)))
        unsent = place(sender, buffer(200_000))
        for _ in range(3):
            sender.trim()
            attachments.trim()
        assert received == buffer(100_000)
        assert sender.counts()["held"] == 2
        del received
        sender.take_back(unsent.descriptor)
        for _ in range(2):
            sender.trim()
        assert sender.counts()["slabs"] == 0


def test_slabs_that_are_filled_later_are_not_given_back_before(attachments: Attachments) -> None:
    """Nor is one that its receiver has let go of before it was filled."""
    with pool() as sender:
        told, later = begin(sender, buffer(100_000))
        fetch(attachments, told, unfilled=[])
        for _ in range(3):
            sender.trim()
        assert sender.counts()["slabs"] == 1
        sender.fill(later)
        for _ in range(2):
            sender.trim()
        assert sender.counts()["slabs"] == 0


def test_a_receiver_lets_go_of_what_the_sender_has_let_go_of(attachments: Attachments) -> None:
    """All that is in use of it stays: here a part of it."""
    mapped = num_mapped()
    with pool(max_nbytes=1 << 20) as sender:
        received = fetch(attachments, place(sender, buffer(1 << 20)))
        kept = received[:100]
        del received
        sender.reclaim(B)
        fetch(attachments, place(sender, buffer(MIN_NBYTES)))
        assert num_mapped() == mapped + 1 + 2, "one that is new, at either end"
        assert kept == buffer(100)
        del kept
        assert num_mapped() == mapped + 2


def test_a_message_that_waits_finds_what_its_sender_has_let_go_of(attachments: Attachments) -> None:
    """One that shuts down lets go of all slabs, and its last messages may be unread until it is known to be gone."""
    mapped = num_mapped()
    with pool() as sender:
        fetch(attachments, place(sender, buffer(100_000)))
        told = place(sender, buffer(100_000, 1))
        assert not told.has_file
        sender.close()
        for _ in range(3):
            attachments.trim()
        assert fetch(attachments, told) == buffer(100_000, 1)
        attachments.forget(A)
        assert num_mapped() == mapped


def test_what_a_lost_worker_held_is_unmapped_by_the_others(attachments: Attachments, others: Attachments) -> None:
    """The lost one does not say that it is free."""
    mapped = num_mapped()
    with pool() as sender:
        fetch(attachments, place(sender, buffer(100_000), B))
        place(sender, buffer(100_000, 1), C)
        sender.reclaim(C)
        attachments.trim()
        assert num_mapped() == mapped


# ---- files ---------------------------------------------------------------------------------------------------------


def num_open() -> int:
    """How many files of slabs this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the folder itself
            count += os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:zrpc-slab")
    return count


def test_the_file_of_a_slab_goes_with_the_first_message_to_each_receiver_only(
    attachments: Attachments, others: Attachments
) -> None:
    with pool() as sender:
        had_file = []
        for seed in range(6):
            receiver, life = ((attachments, B), (others, C))[seed // 2 % 2]
            told = place(sender, buffer(100_000, seed), life)
            had_file.append(told.has_file)
            assert fetch(receiver, told) == buffer(100_000, seed)
        assert had_file == [True, False, True, False, False, False]
        assert sender.counts()["slabs"] == 1


def test_the_files_of_one_message_are_each_slabs_own(attachments: Attachments) -> None:
    """Slabs whose files go with the message stand in it beside one that the receiver has already."""
    with pool() as sender:
        fetch(attachments, place(sender, buffer(300_000)))
        files: list[OwnedFile] = []
        later: list[Fill] = []
        sizes = (100_000, 300_000, 200_000)
        descriptors = [sender.place(B, buffer(nbytes), later, files) for nbytes in sizes]
        sender.fill(later)
        assert [descriptor and descriptor[FILE] for descriptor in descriptors] == [0, NO_FILE, 1]
        came = copies(files)
        for nbytes, descriptor in zip(sizes, descriptors, strict=True):
            assert descriptor is not None
            assert attachments.fetch(A, descriptor, [], came) == buffer(nbytes)


def test_if_the_first_message_is_not_sent_the_file_goes_with_the_next_one(attachments: Attachments) -> None:
    with pool() as sender:
        for seed in range(2):
            told = place(sender, buffer(100_000, seed))
            assert told.has_file
            sender.take_back(told.descriptor)
        told = place(sender, buffer(100_000, 2))
        assert told.has_file
        assert fetch(attachments, told) == buffer(100_000, 2)
        unsent = place(sender, buffer(100_000, 3))
        assert not unsent.has_file
        sender.take_back(unsent.descriptor)
        told = place(sender, buffer(100_000, 4))
        assert not told.has_file, "an earlier message had it"
        assert fetch(attachments, told) == buffer(100_000, 4)


def test_what_a_receiver_was_sent_is_forgotten_with_it() -> None:
    """Many workers may come and go while a slab is there."""
    with pool() as sender:
        sender.take_home(B, place(sender, buffer(100_000)).descriptor).free()
        sender.reclaim(B)
        assert place(sender, buffer(100_000)).has_file
        assert sender.counts()["slabs"] == 1


@pytest.mark.parametrize("let_go", ["reclaim", "give_up", "close"])
def test_the_file_of_a_slab_that_is_let_go_of_stays_open_for_a_message_that_waits(
    attachments: Attachments, let_go: str
) -> None:
    """It is closed with the message, and not before, since another file would have its number."""
    before = num_open()
    with pool() as sender:
        waits = [place(sender, buffer(100_000))]
        if let_go == "reclaim":
            sender.reclaim(B)
        elif let_go == "give_up":
            sender.give_up(waits[0].descriptor)
        else:
            sender.close()
        assert num_open() == before + 1
        assert fetch(attachments, waits[0]) == buffer(100_000)
        waits.clear()
        assert num_open() == before


def test_a_slab_that_is_let_go_of_while_it_is_filled_keeps_no_file_open() -> None:
    before = num_open()
    with pool() as sender:
        waits, later = begin(sender, buffer(100_000))
        sender.reclaim(B)
        del waits
        assert num_open() == before
        sender.fill(later)


def test_a_message_that_is_not_sent_keeps_no_file_open() -> None:
    before = num_open()
    with pool() as sender:
        waits = [place(sender, buffer(100_000), holder) for holder in (B, C)]
        sender.take_back(waits[0].descriptor)
        sender.give_up(waits[1].descriptor)
        del waits
        assert num_open() == before + 1, "the first slab may be used again"
    assert num_open() == before


def test_a_receiver_keeps_no_file_open(attachments: Attachments) -> None:
    """Neither what it has mapped nor what it has refused."""
    with pool() as sender:
        told, other = place(sender, buffer(100_000)), place(sender, buffer(100_000))
        before = num_open()
        received = fetch(attachments, told)
        assert num_open() == before
        with pytest.raises(ProtocolError):
            fetch(attachments, Told(other.descriptor, told.files))
        assert num_open() == before
        assert received == buffer(100_000)


def test_nothing_changes_the_size_of_a_slab() -> None:
    """Who reads memory beyond the end of its file is killed."""
    with pool() as sender:
        told = place(sender, buffer(100_000))
        (file,) = told.files
        nbytes = os.fstat(file.fd).st_size
        for other in (0, nbytes - mmap.PAGESIZE, nbytes + mmap.PAGESIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(file.fd, other)
        with pytest.raises(PermissionError):
            fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(file.fd).st_size == nbytes


@pytest.mark.parametrize(
    ("at", "part", "words"),
    [
        (NUMBER, 7, "the file of another slab"),
        (NUMBER, -7, "the file of another slab"),
        (NUMBER, "7", "describes no slab"),
        (NUMBER, [7], "describes no slab"),
        (NBYTES, 0, "has no room for 0 bytes"),
        (NBYTES, -1, "has no room for -1 bytes"),
        (NBYTES, 1 << 40, "has no room"),
        (NBYTES, None, "describes no slab"),
        (SLOT, HANDED_BACK, "has no slot -2"),
        (SLOT, -3, "has no slot -3"),
        (SLOT, MAX_SLOTS, f"has no slot {MAX_SLOTS}"),
        (SLOT, 1 << 40, "has no slot"),
        (SLOT, "0", "describes no slab"),
        (SLOT, None, "describes no slab"),
        (FILE, NO_FILE, "did not come"),
        (FILE, 1, "did not come"),
        (FILE, -2, "did not come"),
        (FILE, 1 << 40, "did not come"),
        (FILE, "0", "describes no slab"),
        (FILE, False, "describes no slab"),
    ],
)
@pytest.mark.parametrize("is_shared", [False, True])
def test_descriptors_of_nothing_are_refused(
    attachments: Attachments, is_shared: bool, at: int, part: Any, words: str
) -> None:
    with pool() as sender:
        told = share(sender, buffer(100_000))[B] if is_shared else place(sender, buffer(100_000))
        changed = [*told.descriptor[:at], part, *told.descriptor[at + 1 :]]
        with pytest.raises(ProtocolError, match=words):
            fetch(attachments, Told(changed, told.files))
        assert fetch(attachments, told) == buffer(100_000)


@pytest.mark.parametrize("parts", [[], [7], [7, 100_000, NO_SLOT], [7, 100_000, NO_SLOT, 0, 0]])
def test_descriptors_of_other_lengths_are_refused(attachments: Attachments, parts: list[Any]) -> None:
    with pool() as sender, pytest.raises(ProtocolError, match="describes no slab"):
        fetch(attachments, Told(parts, place(sender, buffer(100_000)).files))


def test_the_file_of_another_slab_is_not_taken_for_it(attachments: Attachments) -> None:
    with pool() as sender:
        told, other = place(sender, buffer(100_000)), place(sender, buffer(100_000, 1))
        with pytest.raises(ProtocolError, match="the file of another slab of 4141414141414141 came"):
            fetch(attachments, Told(told.descriptor, other.files))
        assert fetch(attachments, told) == buffer(100_000)
        assert fetch(attachments, other) == buffer(100_000, 1)


def memory_file(
    nbytes: int, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, *, has_pages: bool = True
) -> OwnedFile:
    """A memory file that is no slab."""
    file = OwnedFile(os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.truncate(file.fd, nbytes)
    if nbytes and has_pages:
        os.posix_fallocate(file.fd, 0, nbytes)
    fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, seals)
    return file


def read_only(file: OwnedFile) -> OwnedFile:
    """The same file, open for reading alone."""
    return OwnedFile(os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: memory_file(200_000), "the file of another slab"),
        (lambda _: memory_file(200_000, 0), "is no sealed memory file"),
        (lambda _: memory_file(200_000, fcntl.F_SEAL_SHRINK), "is no sealed memory file"),
        (lambda _: memory_file(200_000, fcntl.F_SEAL_GROW), "is no sealed memory file"),
        (lambda _: memory_file(mmap.PAGESIZE), "is no slab"),
        (lambda _: memory_file(0), "is no slab"),
        (lambda _: memory_file(200_000, has_pages=False), "its memory is not there"),
        (lambda _: read_only(memory_file(200_000)), "Permission denied"),
        (lambda path: OwnedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC)), "cannot be mapped"),
        (lambda path: OwnedFile(os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)), "is no sealed memory file"),
        (lambda _: OwnedFile(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)), "is no sealed memory file"),
        (lambda _: OwnedFile(socket.socket().detach()), "is no sealed memory file"),
    ],
    ids=[
        "another memory file",
        "not sealed",
        "may grow",
        "may shrink",
        "a header alone",
        "empty",
        "without pages",
        "read-only",
        "a file on a disk",
        "a folder",
        "a device",
        "a socket",
    ],
)
@pytest.mark.parametrize("slot", [NO_SLOT, 0])
def test_a_file_that_is_no_slab_is_refused(
    attachments: Attachments, tmp_path: Path, make: Callable[[Path], OwnedFile], slot: int, words: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    with pytest.raises(ProtocolError, match=words):
        fetch(attachments, Told([12345, 100_000, slot, 0], [make(path)]))


# ---- files that a receiver may not open --------------------------------------------------------------------------


WITHOUT_FILE = "may open no more files .* raise its limit with `ulimit -n`"


def test_a_file_that_could_not_be_opened_is_missed_in_words(attachments: Attachments) -> None:
    """It says what to do, unlike one that is not there at all."""
    with pool() as sender:
        told = place(sender, buffer(100_000))
        with pytest.raises(LimitError, match=WITHOUT_FILE):
            attachments.fetch(A, told.descriptor, [], [None])
        assert fetch(attachments, told) == buffer(100_000)


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EAGAIN])
def test_a_slab_that_may_not_be_mapped_is_missed_in_words(
    attachments: Attachments, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A process may have a limited number of mappings, and of memory that is mapped or locked."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, f"100000 bytes cannot be mapped: {os.strerror(code)}")

    with pool() as sender:
        told = place(sender, buffer(100_000))
        with monkeypatch.context() as patched:
            patched.setattr(slab, "map_file", refuse)
            with pytest.raises(LimitError, match=r"can map no more memory .* `ulimit -v`, or vm.max_map_count"):
                fetch(attachments, told)
        assert fetch(attachments, told) == buffer(100_000)


def test_a_slab_that_is_refused_is_free_and_its_file_goes_along_again(attachments: Attachments) -> None:
    """It may go to the same receiver, which may open files again, or to another one."""
    with pool() as sender:
        told = place(sender, buffer(100_000))
        sender.refuse(B, told.descriptor)
        assert sender.counts()["held"] == 0
        again = place(sender, buffer(100_000, 1))
        assert (again.number, again.has_file) == (told.number, True)
        assert fetch(attachments, again) == buffer(100_000, 1)
        assert not place(sender, buffer(100_000, 2)).has_file


def test_a_slab_that_is_refused_while_it_is_filled_is_free_after_that(attachments: Attachments) -> None:
    """The receiver may be quicker than the sender's copy."""
    with pool() as sender:
        told, later = begin(sender, buffer(100_000))
        sender.refuse(B, told.descriptor)
        assert place(sender, buffer(100_000, 1)).number != told.number
        sender.fill(later)
        again = place(sender, buffer(100_000, 2))
        assert again.number == told.number
        assert fetch(attachments, again) == buffer(100_000, 2)


def test_a_shared_slab_that_one_receiver_refuses_is_free_when_the_others_let_go(
    attachments: Attachments, others: Attachments
) -> None:
    """For them it is there."""
    with pool() as sender:
        told = share(sender, buffer(100_000))
        received = fetch(others, told[C])
        sender.refuse(B, told[B].descriptor)
        assert sender.counts()["held"] == 1
        assert received == buffer(100_000)
        del received
        assert sender.counts()["held"] == 0
        told = share(sender, buffer(100_000, 1))
        assert (told[B].has_file, told[C].has_file) == (True, False)
        assert fetch(attachments, told[B]) == fetch(others, told[C]) == buffer(100_000, 1)


def test_who_does_not_hold_a_slab_cannot_refuse_it(attachments: Attachments) -> None:
    """Another worker, or one that names another slot."""
    with pool() as sender:
        told = place(sender, buffer(100_000))
        shared = share(sender, buffer(200_000))
        number, nbytes, *_ = told.descriptor
        for holder, descriptor in (
            (C, told.descriptor),
            (B, [number, nbytes, 0, 0]),
            (B, [number + 1, nbytes, NO_SLOT, 0]),
            (B, [number, -nbytes, NO_SLOT, 0]),
            (C, shared[B].descriptor),
            (A, shared[B].descriptor),
        ):
            with pytest.raises(ProtocolError, match="by a worker that does not hold it"):
                sender.refuse(holder, descriptor)
        assert sender.counts()["held"] == 2
        assert fetch(attachments, told) == buffer(100_000)


def test_a_message_that_is_received_in_part_keeps_nothing(attachments: Attachments) -> None:
    """When its error is gone, without a garbage collection."""
    with pool() as sender:
        later: list[Fill] = []
        files: list[OwnedFile] = []
        payload = pickling.dumps([torch.ones(100_000), torch.ones(200_000), torch.ones(300_000)])
        frames = encode(seal(Reply(), 1, payload, None), lambda raw: sender.place(B, raw, later, files))
        sender.fill(later)
        missing: list[Any] = []

        def take(descriptor: Any) -> memoryview:
            try:
                return attachments.fetch(A, descriptor, [], [*copies(files[:2]), None])
            except LimitError:
                missing.append(descriptor)
                raise

        gc.collect()
        gc.disable()
        try:
            came = decode(frames, take)
            for _ in range(2):
                with pytest.raises(LimitError, match=WITHOUT_FILE):
                    open_payload(came)
            assert sender.counts()["held"] == 3
            del came
            sender.refuse(B, missing[0])
            assert sender.counts()["held"] == 0
        finally:
            gc.enable()


# ---- memory that takes its time ------------------------------------------------------------------------------------


class Held:
    """A call of the system's that takes until the test says so."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.is_held = True
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, *args: Any) -> Any:
        if self.is_held:
            self.has_begun.set()
            assert self.may_end.wait(PATIENCE_S)
        return self._call(*args)


@pytest.fixture(params=["posix_fallocate", "available_nbytes"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """What taking fresh memory waits for: its pages, or what the system says of how much there is."""
    where: Any = os if request.param == "posix_fallocate" else allowance
    made = Held(getattr(where, request.param))
    made.is_held = False
    monkeypatch.setattr(where, request.param, made)
    yield made
    made.may_end.set()


def test_slabs_come_home_while_a_fresh_one_is_made(held: Held) -> None:
    """A sender waits for fresh memory; meanwhile slabs come home, others are sent, and holders are lost."""
    with pool() as sender, ThreadPoolExecutor() as threads:
        first, second = place(sender, buffer(MIN_NBYTES)), place(sender, buffer(MIN_NBYTES))
        held.is_held = True
        making = threads.submit(place, sender, bytes(allowance.ALLOWANCE_NBYTES))
        assert held.has_begun.wait(PATIENCE_S)

        def read() -> None:
            memory = sender.take_home(B, first.descriptor)
            assert memory is not None
            memory.free()
            place(sender, buffer(MIN_NBYTES), A)
            sender.take_back(second.descriptor)
            sender.reclaim(A)

        try:
            threads.submit(read).result(PATIENCE_S)
        finally:
            held.may_end.set()
        making.result(PATIENCE_S)


def test_a_slab_that_is_being_made_counts_already(held: Held) -> None:
    """While one sender waits for fresh memory, another one takes no more than both may have together."""
    with pool(max_nbytes=allowance.ALLOWANCE_NBYTES) as sender, ThreadPoolExecutor() as threads:
        held.is_held = True
        making = threads.submit(place, sender, bytes(allowance.ALLOWANCE_NBYTES))
        assert held.has_begun.wait(PATIENCE_S)
        try:
            assert threads.submit(placed, sender, bytes(MIN_NBYTES)).result(PATIENCE_S) is None
        finally:
            held.may_end.set()
        making.result(PATIENCE_S)


def test_a_pool_that_is_closed_while_a_slab_is_made_keeps_none(held: Held) -> None:
    """A pool is closed while a sender waits for fresh memory: that buffer goes another way, and no file stays open."""
    with pool() as sender, ThreadPoolExecutor() as threads:
        held.is_held = True
        making = threads.submit(placed, sender, bytes(allowance.ALLOWANCE_NBYTES))
        assert held.has_begun.wait(PATIENCE_S)
        try:
            threads.submit(sender.close).result(PATIENCE_S)
        finally:
            held.may_end.set()
        assert making.result(PATIENCE_S) is None
        assert sender.counts()["nbytes"] == 0


def test_a_log_handler_may_send_where_no_slab_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning that sockets are used is given under no lock: a handler of the log may itself send."""
    answer(monkeypatch, lambda: 0)
    with pool() as sender, pool(max_nbytes=1) as full, ThreadPoolExecutor() as threads:

        class Sends(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                assert placed(sender, bytes(MIN_NBYTES)) is None
                assert placed(full, bytes(MIN_NBYTES)) is None

        handler = Sends()
        logging.getLogger("zrpc").addHandler(handler)
        try:
            for one in (sender, full):
                assert threads.submit(placed, one, bytes(MIN_NBYTES)).result(PATIENCE_S) is None
        finally:
            logging.getLogger("zrpc").removeHandler(handler)


# ---- devices -------------------------------------------------------------------------------------------------------


class InPieces(Arriving):
    """A buffer that comes in pieces of 1,000 bytes, and may fail in the end."""

    def __init__(self, content: memoryview, error: Exception | None = None) -> None:
        self.nbytes = len(content)
        self._content = content
        self._error = error

    def pieces(self) -> Iterator[memoryview]:
        for start in range(0, self.nbytes, 1000):
            yield self._content[start : start + 1000]
        if self._error is not None:
            raise self._error


def test_a_buffer_that_arrives_in_pieces_is_placed(attachments: Attachments) -> None:
    with pool() as sender:
        assert fetch(attachments, place(sender, InPieces(buffer(100_500)))) == buffer(100_500)


def test_a_buffer_that_does_not_arrive_leaves_no_slab_behind() -> None:
    with pool() as sender:
        with pytest.raises(DeviceError, match="it failed"):
            place(sender, InPieces(buffer(100_500), DeviceError("it failed")))
        assert sender.counts()["held"] == 0


class Pins:
    """Notes what is pinned."""

    def __init__(self, works: bool = True) -> None:
        self.pinned: dict[int, int] = {}
        self.tried = 0
        self._works = works

    def register(self, address: int, nbytes: int) -> bool:
        self.tried += 1
        if self._works:
            self.pinned[address] = nbytes
        return self._works

    def unregister(self, address: int) -> None:
        del self.pinned[address]


def test_slabs_are_pinned_once_and_unpinned_before_they_are_let_go_of(attachments: Attachments) -> None:
    pins = Pins()
    with pool() as sender:
        for seed in range(3):
            received: Any = fetch(attachments, place(sender, buffer(100_000, seed)))
            attachments.pin(received, pins)
            assert received == buffer(100_000, seed)
            del received
            gc.collect()
        assert pins.tried == 1
        ((address, nbytes),) = pins.pinned.items()
        assert (address % mmap.PAGESIZE, nbytes) == (0, mmap.PAGESIZE + size_class(100_000))
        kept = fetch(attachments, place(sender, buffer(100_000)))
        attachments.forget(A)
        assert not pins.pinned
        attachments.pin(kept, pins)
        assert not pins.pinned, "nobody would unpin it"


def test_what_cannot_be_pinned_is_left_as_it_is(attachments: Attachments) -> None:
    pins = Pins(works=False)
    with pool() as sender:
        received = fetch(attachments, place(sender, buffer(100_000)))
        attachments.pin(received, pins)
        attachments.pin(received, pins)
        attachments.pin(memoryview(bytearray(10)), pins)
        attachments.pin(b"bytes", pins)
        assert pins.tried == 1
        attachments.close()


def test_pinned_slabs_are_unpinned_at_the_end() -> None:
    pins, attachments = Pins(), Attachments()
    with pool() as sender:
        received = fetch(attachments, place(sender, buffer(100_000)))
        attachments.pin(received, pins)
        assert pins.pinned
        attachments.close()
        assert not pins.pinned


def test_a_forked_child_lets_go_of_nothing(attachments: Attachments) -> None:
    """It has its parent's references, and drops them when it ends, or before."""
    with pool() as sender:
        descriptor = place(sender, buffer(MIN_NBYTES))
        loan: list[memoryview] = [fetch(attachments, descriptor)]
        child = os.fork()
        if not child:
            loan.clear()
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert sender.counts()["held"] == 1
        loan.clear()
        assert sender.counts()["held"] == 0


def test_no_slab_is_made_where_it_cannot_be_found_out_how_much_memory_there_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sockets are used then, and the log says why."""

    def fail() -> int | None:
        raise OSError(24, "Too many open files")

    answer(monkeypatch, fail)
    pool = SlabPool(1 << 30, 8)
    try:
        assert pool.place(b"12345678", bytes(1 << 20), []) is None
    finally:
        pool.close()
    finalizers.run_pending()
    assert "it cannot be found out how much memory is available" in caplog.text


# ---- shared slabs ---------------------------------------------------------------------------------------------------


def test_several_receivers_share_a_slab_and_each_may_write_to_its_own(
    attachments: Attachments, others: Attachments
) -> None:
    with pool() as sender:
        original = buffer(100_000)
        told = share(sender, original)
        one, other = fetch(attachments, told[B]), fetch(others, told[C])
        assert one == other == original
        one[5:10] = b"xxxxx"
        assert other == original
        other[0] = 99
        assert bytes(one[:10]) == bytes(original[:5]) + b"xxxxx"
        assert sender.counts()["slabs"] == 1


def test_a_shared_slab_is_used_again_once_no_receiver_sees_it(attachments: Attachments, others: Attachments) -> None:
    """What a receiver wrote into its own copy is not seen the next time."""
    with pool() as sender:
        told = share(sender, buffer(100_000))
        one, other = fetch(attachments, told[B]), fetch(others, told[C])
        one[:] = bytes(100_000)
        del one
        assert place(sender, buffer(100_000, 1)).number != told[B].number, "the other one holds it"
        del other
        again = share(sender, buffer(100_000, 2))
        assert again[B].number == told[B].number
        assert fetch(attachments, again[B]) == fetch(others, again[C]) == buffer(100_000, 2)
        assert fetch(attachments, place(sender, buffer(100_000, 3))) == buffer(100_000, 3)


def test_a_shared_slab_becomes_one_receivers_and_shared_again(attachments: Attachments, others: Attachments) -> None:
    with pool() as sender:
        for seed in range(6):
            if seed % 2:
                descriptor = place(sender, buffer(100_000, seed))
                assert fetch(attachments, descriptor) == buffer(100_000, seed)
            else:
                told = share(sender, buffer(100_000, seed))
                for receiver, life in ((attachments, B), (others, C)):
                    seen = fetch(receiver, told[life])
                    assert seen == buffer(100_000, seed)
                    seen[:] = bytes(100_000)
                    del seen
        assert sender.counts()["slabs"] == 1


def test_a_shared_slab_that_a_lost_receiver_held_is_never_filled_again(attachments: Attachments) -> None:
    """The others keep what they see."""
    with pool() as sender:
        told = share(sender, buffer(100_000))
        seen = fetch(attachments, told[B])
        sender.reclaim(C)
        for seed in range(3):
            assert place(sender, buffer(100_000, 50 + seed)).number != told[B].number
        assert seen == buffer(100_000)


def test_a_receiver_that_lives_may_open_a_shared_slab_after_another_one_was_lost(attachments: Attachments) -> None:
    with pool() as sender:
        told = share(sender, buffer(100_000))
        sender.reclaim(C)
        assert fetch(attachments, told[B]) == buffer(100_000)


def test_a_receiver_that_was_not_told_of_a_shared_slab_does_not_hold_it(attachments: Attachments) -> None:
    with pool() as sender:
        told = share(sender, buffer(100_000))
        sender.take_back(told[C].descriptor)
        fetch(attachments, told[B])
        assert sender.counts()["held"] == 0


def test_a_receiver_that_may_have_been_told_of_a_shared_slab_keeps_it_from_being_filled(
    attachments: Attachments,
) -> None:
    with pool() as sender:
        told = share(sender, buffer(100_000))
        sender.give_up(told[C].descriptor)
        assert place(sender, buffer(100_000, 1)).number != told[B].number
        seen = fetch(attachments, told[B])
        assert seen == buffer(100_000)
        del seen
        assert place(sender, buffer(100_000, 2)).number != told[B].number
        assert sender.counts()["slabs"] == 2, "the shared one is gone"


@pytest.mark.parametrize("let_go", ["take_back", "give_up"])
def test_a_shared_slab_is_let_go_of_once_those_that_live_were_not_told_of_it(let_go: str) -> None:
    """One receiver was lost before the others were told."""
    with pool() as sender:
        told = share(sender, buffer(100_000))
        sender.reclaim(B)
        getattr(sender, let_go)(told[C].descriptor)
        place(sender, buffer(300_000))
        assert sender.counts()["nbytes"] == size_class(300_000)


def test_what_is_too_small_to_share_travels_as_frames() -> None:
    with pool() as sender:
        assert sender.share([B, C], bytes(MIN_NBYTES - 1)) is None
        assert sender.share([bytes([number % 256, number // 256]) for number in range(5000)], bytes(MIN_NBYTES)) is None


def test_each_receiver_of_a_shared_slab_gets_its_file_once_for_its_slot(
    attachments: Attachments, others: Attachments
) -> None:
    with pool() as sender:
        had_file = []
        for seed, order in enumerate(([B, C], [C, B]) * 2):
            told = share(sender, buffer(100_000, seed), order)
            had_file += [told[B].has_file, told[C].has_file]
            assert fetch(attachments, told[B]) == fetch(others, told[C]) == buffer(100_000, seed)
        assert had_file == [True] * 4 + [False] * 4
        assert place(sender, buffer(100_000)).has_file, "who has it alone maps it in another way"
        assert sender.counts()["slabs"] == 1


def test_a_receiver_that_was_not_told_of_a_shared_slab_gets_its_file_the_next_time(attachments: Attachments) -> None:
    with pool() as sender:
        had_file = []
        for seed in range(3):
            told = share(sender, buffer(100_000, seed))
            had_file.append((told[B].has_file, told[C].has_file))
            sender.take_back(told[C].descriptor)
            assert fetch(attachments, told[B]) == buffer(100_000, seed)
        assert had_file == [(True, True), (False, True), (False, True)]
        assert sender.counts()["slabs"] == 1


def test_a_shared_slab_that_is_gone_has_no_file() -> None:
    """The pool was closed before the receiver was told."""
    with pool() as sender:
        descriptors = sender.share([B, C], buffer(100_000))
        assert descriptors is not None
        sender.close()
        files: list[OwnedFile] = []
        sender.attach(B, descriptors[B], files)
        assert (descriptors[B][FILE], files) == (NO_FILE, [])


def test_a_shared_slab_is_not_handed_back(attachments: Attachments) -> None:
    with pool() as sender:
        told = share(sender, buffer(100_000))
        buffers: list[Any] = [fetch(attachments, told[B])]
        handed: list[Any] = []
        attachments.hand_back(A, buffers, handed)
        assert not handed
        assert buffers[0] == buffer(100_000)


def test_a_slab_that_is_in_use_does_not_come_again(attachments: Attachments) -> None:
    """Two tensors would see the same memory, and its owner would fill it anew once the first of them is gone."""
    with pool() as sender:
        told = place(sender, bytes(100_000))
        first = fetch(attachments, told)
        with pytest.raises(ProtocolError, match="came twice, and is in use"):
            fetch(attachments, told)
        assert first == bytes(100_000)
