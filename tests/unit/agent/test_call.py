"""A call is done once, whoever comes first, and tells everybody who asks."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import pytest

from zrpc import finalizers
from zrpc.agent.call import Call
from zrpc.agent.gate import Gate
from zrpc.errors import PeerLostError, RpcTimeoutError
from zrpc.ids import WorkerInfo
from zrpc.wire.envelope import Envelope
from zrpc.wire.messages import Failure, Reply, RRefUserDelete
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0
PEER = WorkerInfo("callee", 1)
MESSAGE = RRefUserDelete((0, 1), (0, 2))  # type: ignore[arg-type]  # it makes ids of them


class Owner:
    """A table of one call; whoever takes it out may complete it."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.opened: list[threading.Thread] = []
        self.discarded: list[Envelope] = []
        self.unsent: set[int] = set()
        self.open: Callable[[Envelope], Payload] = lambda envelope: Payload(envelope.data)

    def call(self, timeout_s: float = 0.0) -> Call:
        call = Call(self, 7, PEER, Gate(0, 0), MESSAGE, timeout_s, waited=False)
        self.calls[7] = call
        return call

    def finish(self, answer: Envelope | None = None, error: BaseException | None = None) -> bool:
        call = self.calls.pop(7, None)
        if call is None:
            return False
        work = call.complete(answer, error)
        if work is not None:
            work()
        return True

    def abandon(self, call_id: int) -> bool:
        return self.calls.pop(call_id, None) is not None

    def withdraw(self, call_id: int) -> bool:
        return call_id in self.unsent

    def wait_for(self, wanted: Call, deadline: float | None) -> None:
        wanted.block(deadline)

    def discard(self, answer: Envelope) -> None:
        self.discarded.append(answer)

    def wake(self, wanted: Call) -> None:
        """No thread reads here."""

    def open_answer(self, call: Call, envelope: Envelope) -> Payload:
        self.opened.append(threading.current_thread())
        return self.open(envelope)


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


ANSWER = Envelope(Reply(), 7, data=b"result")


@pytest.mark.parametrize("timeout_s", [0.0, 60.0])
def test_waiting_gives_the_answer(timeout_s: float) -> None:
    owner = Owner()
    call = owner.call(timeout_s)
    assert not call.done()
    thread = in_thread(lambda: owner.finish(ANSWER))
    assert call.wait().data == b"result"
    thread.join()
    assert call.done()
    assert call.error is None
    assert call.wait() is call.result()


def test_waiting_raises_what_went_wrong_every_time() -> None:
    owner = Owner()
    call = owner.call()
    error = PeerLostError("gone")
    owner.finish(error=error)
    lengths = set()
    for _ in range(50):
        with pytest.raises(PeerLostError, match="gone") as caught:
            call.wait()
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1, "the traceback grew"
    assert call.error is error


def test_many_threads_may_wait() -> None:
    owner = Owner()
    call = owner.call(60.0)
    results: list[bytes] = []
    threads = [in_thread(lambda: results.append(bytes(call.wait().data))) for _ in range(8)]
    owner.finish(ANSWER)
    for thread in threads:
        thread.join()
    assert results == [b"result"] * 8
    assert len(owner.opened) == 1


def test_the_answer_is_opened_by_who_asks_and_not_by_who_brings_it() -> None:
    owner = Owner()
    call = owner.call()
    in_thread(lambda: owner.finish(ANSWER)).join()
    assert owner.opened == []
    call.wait()
    assert owner.opened == [threading.current_thread()]


def test_what_fails_while_it_is_opened_is_the_outcome() -> None:
    owner = Owner()
    call = owner.call()

    def fail(_: Envelope) -> Payload:
        raise KeyError("remote")

    owner.open = fail
    owner.finish(ANSWER)
    assert isinstance(call.error, KeyError)
    with pytest.raises(KeyError):
        call.wait()
    assert len(owner.opened) == 1


def test_asking_for_the_error_too_early_spoils_nothing() -> None:
    owner = Owner()
    call = owner.call()
    assert call.error is None
    owner.finish(ANSWER)
    assert call.wait().data == b"result"


def test_the_time_limit_ends_the_wait_and_the_call() -> None:
    owner = Owner()
    call = owner.call(0.01)
    with pytest.raises(
        RpcTimeoutError, match=r"time limit of 10 ms: RRefUserDelete to WorkerInfo\(id=1, name=callee\)"
    ):
        call.wait()
    assert owner.calls == {}
    assert not owner.finish(ANSWER), "a late answer finds nobody"
    assert isinstance(call.error, RpcTimeoutError)


def test_a_call_that_ran_out_of_time_before_it_could_be_sent_says_that_it_was_not() -> None:
    owner = Owner()
    call = owner.call(0.01)
    owner.unsent.add(call.call_id)
    with pytest.raises(RpcTimeoutError, match="It was not sent, as there is no connection to a broker"):
        call.wait()


def test_a_call_whose_time_is_over_before_the_wait_ends_at_once() -> None:
    owner = Owner()
    call = owner.call(1e-9)
    with pytest.raises(RpcTimeoutError):
        call.wait()


def test_the_deadline_may_be_kept_by_somebody_else() -> None:
    owner = Owner()
    call = owner.call(60.0)
    done = threading.Event()
    call.add_done_callback(lambda _: done.set())
    work = owner.calls.pop(7).expire()
    assert work is not None
    in_thread(work).join()
    assert done.is_set()
    with pytest.raises(RpcTimeoutError):
        call.wait()


def test_an_answer_that_comes_with_the_time_limit_completes_the_call_once() -> None:
    for _ in range(200):
        owner = Owner()
        call = owner.call(1e-6)
        completions: list[Call] = []
        call.add_done_callback(completions.append)
        gate = threading.Barrier(2)

        def answer(owner: Owner = owner, gate: threading.Barrier = gate) -> None:
            gate.wait(WAIT_S)
            owner.finish(ANSWER)

        thread = in_thread(answer)
        gate.wait(WAIT_S)
        with contextlib.suppress(RpcTimeoutError):
            assert call.wait().data == b"result"
        thread.join()
        assert completions == [call]
        assert owner.calls == {}


def test_callbacks_run_when_it_is_done_or_at_once() -> None:
    owner = Owner()
    call = owner.call()
    threads: list[threading.Thread] = []
    for _ in range(3):
        call.add_done_callback(lambda _: threads.append(threading.current_thread()))
    assert threads == []
    bringer = in_thread(lambda: owner.finish(ANSWER))
    bringer.join()
    assert threads == [bringer] * 3

    def late(done: Call) -> None:
        assert done.result().data == b"result"
        threads.append(threading.current_thread())

    call.add_done_callback(late)
    assert threads[3:] == [threading.current_thread()]


def test_callbacks_run_once_even_if_they_are_added_while_it_is_completed() -> None:
    for _ in range(100):
        owner = Owner()
        call = owner.call()
        count = 50
        ran: list[int] = []
        gate = threading.Barrier(2)

        def add(call: Call = call, ran: list[int] = ran, gate: threading.Barrier = gate, count: int = count) -> None:
            gate.wait(WAIT_S)
            for number in range(count):
                call.add_done_callback(lambda _, number=number: ran.append(number))  # type: ignore[misc]

        thread = in_thread(add)
        gate.wait(WAIT_S)
        owner.finish(ANSWER)
        thread.join()
        assert sorted(ran) == list(range(count))


def test_a_callback_that_fails_keeps_neither_the_others_nor_the_caller_from_anything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner = Owner()
    call = owner.call()
    ran: list[Call] = []

    def fail(_: Call) -> None:
        raise ValueError("mine")

    call.add_done_callback(fail)
    call.add_done_callback(ran.append)
    owner.finish(ANSWER)
    assert ran == [call]
    assert call.wait().data == b"result"
    finalizers.run_pending()
    assert "RRefUserDelete to WorkerInfo" in caplog.text


@contextlib.contextmanager
def rebuilding() -> Iterator[Call]:
    """A call that failed, while a thread rebuilds its exception, which takes as long as the test does."""
    owner = Owner()
    call = owner.call()
    is_opening, may_end = threading.Event(), threading.Event()

    def rebuild(_: Envelope) -> Payload:
        is_opening.set()
        assert may_end.wait(WAIT_S)
        raise KeyError("remote")

    owner.open = rebuild
    owner.finish(Envelope(Failure("KeyError", "remote", "traceback"), 7))
    opener = in_thread(lambda: call.error)
    assert is_opening.wait(WAIT_S)
    try:
        yield call
    finally:
        may_end.set()
        opener.join()
    assert isinstance(call.error, KeyError)


def test_that_a_call_failed_is_known_while_its_error_is_rebuilt() -> None:
    """Those who only ask whether it failed do not take it for one that succeeded."""
    with rebuilding() as call:
        assert call.failed


def test_nothing_is_held_while_an_error_is_rebuilt() -> None:
    """Exceptions are rebuilt by code of their classes: another thread may add a callback meanwhile."""
    called = threading.Event()
    with rebuilding() as call:
        adder = in_thread(lambda: call.add_done_callback(lambda _: called.set()))
        was_called = called.wait(WAIT_S / 4)
    adder.join()
    assert was_called
