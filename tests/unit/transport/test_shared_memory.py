"""Memory that two workers share: slabs that go back with answers."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.unit.transport.slab_messages import A, B, C, Told, fetch, place, placed
from tests.unit.transport.test_slabs import Pins, buffer
from zrpc import finalizers
from zrpc.errors import LimitError, ProtocolError
from zrpc.transport import allowance, slabs
from zrpc.transport.shared_memory import SharedMemory, is_refusal, refusal
from zrpc.transport.slab import FILE, HANDED_BACK, NBYTES, NO_FILE, NO_SLOT, NUMBER, SLOT
from zrpc.wire.envelope import HandedBack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from zrpc.transport.packets import OwnedFile

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")


@contextmanager
def pair() -> Iterator[tuple[SharedMemory, SharedMemory]]:
    """The shared memory of A and that of B."""
    a, b = SharedMemory(), SharedMemory()
    try:
        yield a, b
    finally:
        a.close()
        b.close()


def send(sender: SharedMemory, to: bytes, raw: memoryview) -> Told:
    """What `to` is told of `raw`, which lies in shared memory then."""
    return place(sender, raw, to)


def returned(memory: SharedMemory, to: bytes, buffers: list[Any]) -> Told | None:
    """What `to` is told by which the one buffer is handed back to it, if it is."""
    handed: list[Any] = []
    memory.hand_back(to, buffers, handed)
    assert len(handed) == isinstance(buffers[0], HandedBack)
    return Told(handed[0]) if handed else None


def give_back(memory: SharedMemory, to: bytes, buffers: list[Any]) -> Told:
    """Hand the one buffer back to `to`."""
    back = returned(memory, to, buffers)
    assert back is not None
    assert back.descriptor[SLOT:] == [HANDED_BACK, NO_FILE]
    return back


def test_two_workers_send_to_each_other_in_shared_memory() -> None:
    with pair() as (a, b):
        there, back = send(a, B, buffer(100_000)), send(b, A, buffer(100_000, 1))
        assert fetch(b, there) == buffer(100_000)
        assert fetch(a, back, B) == buffer(100_000, 1)


def test_what_is_for_one_worker_alone_is_not_shared() -> None:
    with pair() as (a, b):
        assert a.share([], buffer(100_000)) is None
        assert a.share([B], buffer(100_000)) is None
        told = a.share([B, C], buffer(100_000))
        assert told is not None
        files: list[OwnedFile] = []
        a.attach(B, told[B], files)
        assert fetch(b, Told(told[B], files)) == buffer(100_000)
        a.take_back(told[C])
        assert a.counts()["held"] == 0


def test_of_a_worker_that_is_lost_nothing_is_kept_but_what_is_in_use() -> None:
    """It is told of no slab that it was told of before, should it live after all."""
    with pair() as (a, b):
        told = send(a, B, buffer(100_000))
        received = fetch(b, told)
        a.forget(B)
        b.forget(A)
        assert send(a, B, buffer(100_000, 1)).number != told.number
        assert received == buffer(100_000)
        with pytest.raises(ProtocolError, match="did not come"):
            fetch(b, Told([*told.descriptor[:FILE], NO_FILE]))


def test_a_worker_that_can_send_nothing_in_shared_memory_receives_what_others_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be found out how much memory it may take: it sends through sockets, and a warning says so, once."""

    def fail() -> int:
        raise OSError(24, "Too many open files")

    with pair() as (a, _):
        with monkeypatch.context() as patched:
            patched.setattr(allowance, "available_nbytes", fail)
            memory = SharedMemory.make()
        try:
            assert fetch(memory, send(a, B, buffer(100_000))) == buffer(100_000)
            assert placed(memory, buffer(100_000)) is None
            assert memory.share([A, C], buffer(100_000)) is None
        finally:
            memory.close()
    finalizers.run_pending()
    assert caplog.text.count("sockets are used: [Errno 24] Too many open files") == 1
    assert caplog.text.count("WARNING") == 1


def test_a_slab_that_could_not_be_received_is_free_once_its_sender_is_told() -> None:
    """By a frame, which is no other message."""
    with pair() as (a, b):
        told = send(a, B, buffer(100_000))
        with pytest.raises(LimitError):
            b.fetch(A, told.descriptor, [], [None])
        frame = refusal(told.descriptor)
        assert is_refusal([frame])
        assert not is_refusal([frame, b""])
        assert not is_refusal([frame[1:]])
        a.take_refusal(B, frame)
        assert a.counts()["held"] == 0


@pytest.mark.parametrize(
    "parts", [None, 7, [], [7, 100_000, NO_SLOT], [7, "1", NO_SLOT, 0], [7, 100_000, NO_SLOT, None]]
)
def test_a_refusal_that_names_no_slab_is_not_taken(parts: Any) -> None:
    """Nor one that is cut off."""
    with pair() as (a, _):
        told = send(a, B, buffer(100_000))
        with pytest.raises(ProtocolError, match="describes no slab"):
            a.take_refusal(B, refusal(parts))
        with pytest.raises(ProtocolError, match="cannot be read"):
            a.take_refusal(B, refusal(told.descriptor)[:-1])
        assert a.counts()["held"] == 1


# ---- handed back -----------------------------------------------------------------------------------------------------


def test_what_came_is_handed_back_by_who_keeps_nothing_of_it() -> None:
    with pair() as (a, b):
        descriptor = send(a, B, buffer(100_000))
        received = fetch(b, descriptor)
        received[0] = 77
        buffers = [received]
        del received
        back = give_back(b, A, buffers)
        assert back.number == descriptor.number
        home = fetch(a, back, B)
        assert home[0] == 77
        assert home[1:] == buffer(100_000)[1:]
        assert a.counts()["held"] == 1
        a.forget(B)
        assert a.counts()["held"] == 1, "it is with A, whatever becomes of B"
        other = send(b, A, buffer(100_000, 1))
        del home
        assert a.counts()["held"] == 0
        assert b.counts() | {"nbytes": 0} == {"slabs": 1, "held": 1, "nbytes": 0, "placed": 1}
        assert fetch(a, other, B) == buffer(100_000, 1)


@pytest.mark.parametrize("kept", [slice(None), slice(5, 6)])
def test_what_somebody_sees_yet_stays(kept: slice) -> None:
    with pair() as (a, b):
        buffers = [fetch(b, send(a, B, buffer(100_000)))]
        part = buffers[0][kept]
        assert returned(b, A, buffers) is None
        assert buffers[0] == buffer(100_000)
        buffers.clear()
        assert a.counts()["held"] == 1
        assert part == buffer(100_000)[kept]
        del part
        assert a.counts()["held"] == 0


def test_a_tensor_that_is_kept_elsewhere_stays() -> None:
    with pair() as (a, b):
        tensor = torch.frombuffer(fetch(b, send(a, B, buffer(100_000))), dtype=torch.uint8)
        alias = tensor.view(100, 1000).t()
        buffers = [tensor.numpy().data]
        del tensor
        assert returned(b, A, buffers) is None
        del alias
        assert returned(b, A, buffers) is not None


def test_only_its_owner_gets_a_slab_back() -> None:
    with pair() as (a, b):
        buffers = [fetch(b, send(a, B, buffer(100_000)))]
        assert returned(b, C, buffers) is None
        own: list[Any] = [buffer(100_000)]
        assert returned(b, A, own) is None
        assert own == [buffer(100_000)]
        home = fetch(a, give_back(b, A, buffers), B)
        assert returned(a, A, [home]) is None, "it is with its owner already"
        assert returned(a, B, [home]) is None


class Interrupted(list[Any]):
    """The one buffer of a message: `looked()` is called after each look at it, `let_go()` once it was let go of."""

    def __init__(self, buffer: memoryview, looked: Callable[[], object], let_go: Callable[[], object]) -> None:
        super().__init__([buffer])
        self._looked = looked
        self._let_go = let_go

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self._looked()
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._let_go()


def test_of_two_messages_at_once_none_hands_back_what_the_other_sees() -> None:
    with pair() as (a, b), ThreadPoolExecutor(1) as thread:
        received = fetch(b, send(a, B, buffer(100_000)))
        has_let_go, may_go_on = threading.Event(), threading.Event()

        def wait() -> None:
            has_let_go.set()
            assert may_go_on.wait(10)

        other = Interrupted(received, bool, wait)
        handed: list[Any] = []
        looks: list[Future[None]] = []

        def meanwhile() -> None:
            if len(looks) == 2:  # the third look: it is found to be a loan, and not yet let go of
                looks.append(thread.submit(b.hand_back, A, other, handed))
                assert has_let_go.wait(10)
            else:
                looks.append(Future())

        buffers = Interrupted(received, meanwhile, bool)
        del received
        b.hand_back(A, buffers, handed)
        assert len(looks) >= 3
        may_go_on.set()
        looks[2].result(10)
        assert not handed
        assert buffers[0] == other[0] == buffer(100_000)
        buffers.clear()
        assert a.counts()["held"] == 1
        other.clear()
        assert a.counts()["held"] == 0


class Late:
    """Stops the thread that it traces where a loan is to be given back."""

    def __init__(self) -> None:
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        del event, argument
        if frame.f_code.co_name == "give_back":
            self.arrived.set()
            assert self.go_on.wait(10)


def test_a_death_that_is_told_of_late_frees_nothing_that_was_lent_since() -> None:
    with pair() as (a, b):
        descriptor = send(a, B, buffer(100_000))
        received = fetch(b, descriptor)
        part = [received[5:6]]
        late, is_let_go_of = Late(), threading.Event()

        def drop() -> None:
            assert is_let_go_of.wait(10)
            sys.settrace(late)
            part.clear()
            sys.settrace(None)

        def let_go() -> None:
            is_let_go_of.set()
            assert late.arrived.wait(10)

        thread = threading.Thread(target=drop)
        thread.start()
        buffers = Interrupted(received, bool, let_go)
        del received
        back = give_back(b, A, buffers)
        assert back.number == descriptor.number
        fetch(a, back, B)
        again = send(a, B, buffer(100_000, 1))
        assert again.number == descriptor.number
        received = fetch(b, again)
        late.go_on.set()
        thread.join()
        assert a.counts()["held"] == 1
        send(a, B, buffer(100_000, 2))
        assert received == buffer(100_000, 1)


def test_nothing_is_handed_back_to_a_worker_that_is_lost() -> None:
    with pair() as (a, b):
        buffers = [fetch(b, send(a, B, buffer(100_000)))]
        b.forget(A)
        assert returned(b, A, buffers) is None
        buffers.clear()
        assert a.counts()["held"] == 0


def test_a_small_part_of_a_slab_is_not_worth_it() -> None:
    with pair() as (a, b):
        buffers = [fetch(b, send(a, B, buffer(1_000_000)))[:100_000]]
        assert returned(b, A, buffers) is None
        buffers.clear()
        assert a.counts()["held"] == 0


def test_what_is_handed_back_and_not_sent_is_free() -> None:
    with pair() as (a, b):
        buffers = [fetch(b, send(a, B, buffer(100_000)))]
        back = give_back(b, A, buffers)
        assert a.counts()["held"] == 1
        b.take_handed_back(A, back.descriptor)
        assert a.counts()["held"] == 0


def test_a_slab_that_comes_home_and_goes_out_again_needs_no_file() -> None:
    with pair() as (a, b):
        for seed in range(3):
            told = send(a, B, buffer(100_000, seed))
            assert told.has_file == (seed == 0)
            assert fetch(a, give_back(b, A, [fetch(b, told)]), B) == buffer(100_000, seed)
        assert a.counts()["slabs"] == 1


def test_slabs_that_come_and_go_are_not_given_back() -> None:
    """An echo uses one slab for as long as it goes on, however often `trim` looks; then it is let go of."""
    with pair() as (a, b):
        for seed in range(10):
            told = send(a, B, buffer(100_000, seed))
            assert told.has_file == (seed == 0)
            assert fetch(a, give_back(b, A, [fetch(b, told)]), B) == buffer(100_000, seed)
            a.trim()
            b.trim()
        a.trim()
        assert a.counts()["slabs"] == 0


def test_a_slab_does_not_come_back_from_who_does_not_hold_it() -> None:
    with pair() as (a, b):
        number, nbytes, *_ = send(a, B, buffer(100_000)).descriptor
        back = Told([number, nbytes, HANDED_BACK, NO_FILE])
        with pytest.raises(ProtocolError, match="does not hold it"):
            fetch(a, back, C)
        home = fetch(a, back, B)
        with pytest.raises(ProtocolError, match="does not hold it"):
            fetch(a, back, B)
        del home
        with pytest.raises(ProtocolError, match="does not hold it"):
            fetch(a, back, B)
        assert b.counts()["placed"] == 0


@pytest.mark.parametrize(
    ("at", "part"),
    [(NUMBER, 7), (NUMBER, None), (NUMBER, [7]), (NBYTES, 0), (NBYTES, -1), (NBYTES, 1 << 40), (NBYTES, "1")],
)
def test_a_slab_that_there_is_none_of_does_not_come_back(at: int, part: Any) -> None:
    with pair() as (a, _):
        number, nbytes, *_ = send(a, B, buffer(100_000)).descriptor
        parts: list[Any] = [number, nbytes, HANDED_BACK, NO_FILE]
        parts[at] = part
        with pytest.raises(ProtocolError, match="does not hold it"):
            fetch(a, Told(parts), B)
        assert fetch(a, Told([number, nbytes, HANDED_BACK, NO_FILE]), B) == buffer(100_000)


def test_a_shared_slab_does_not_come_back() -> None:
    """Its other receivers may see it."""
    with pair() as (a, _):
        told = a.share([B, C], buffer(100_000))
        assert told is not None
        number, nbytes, *_ = told[B]
        with pytest.raises(ProtocolError, match="does not hold it"):
            fetch(a, Told([number, nbytes, HANDED_BACK, NO_FILE]), B)


def test_a_slab_that_came_home_is_pinned_until_it_is_let_go_of() -> None:
    pins = Pins()
    with pair() as (a, b):
        for seed in range(3):
            home = fetch(a, give_back(b, A, [fetch(b, send(a, B, buffer(100_000, seed)))]), B)
            a.pin(home, pins)
            assert home == buffer(100_000, seed)
            del home
        assert pins.tried == 1
        assert pins.pinned
        a.close()
        assert not pins.pinned
