"""Who reads: readers, callers that wait, and who takes over from whom. Real sockets, no time is asserted."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import zmq

from tests.waiting import until
from zrpc import finalizers, interrupts
from zrpc.transport.inbox import READERS, Inbox
from zrpc.transport.socket_link import send_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.transport.inbox import Work
    from zrpc.wire.envelope import Buffer

WAIT_S = 20.0


class Wanted:
    """Something that a thread waits for."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self.blocked = threading.Event()

    def done(self) -> bool:
        return self._came.is_set()

    def come(self) -> None:
        self._came.set()

    def block(self, deadline: float | None) -> None:
        self.blocked.set()
        assert self._came.wait(WAIT_S)


class Office:
    """An inbox, its readers, and what came: `name -> thread that took it`. `work` and `wanted` say what messages do."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.RCVHWM, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        self._dealer = context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.SNDHWM, 0)
        self._dealer.connect(f"tcp://127.0.0.1:{port}")
        self.inbox = Inbox(router, self.take, lambda: self._over, lambda: self.send(b""))
        self._over = False
        self.work: dict[bytes, Work] = {}
        self.wanted: dict[bytes, Wanted] = {}
        self.took: dict[bytes, str] = {}
        self.order: list[bytes] = []
        self.on_take: Work = lambda: None
        self.on_message: Callable[[bytes], None] = lambda _: None
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self.inbox.run, name=f"reader-{n}") for n in range(READERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, name: bytes) -> None:
        send_frames(self._dealer, [name])

    def wait_taken(self, name: bytes) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.took, WAIT_S)
            return self.took[name]

    def close(self) -> None:
        self._over = True
        self.send(b"")
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(WAIT_S)
                assert not thread.is_alive()
        self.inbox.close()
        self._dealer.close(0)

    def end(self) -> None:
        self.inbox.close()
        self._over = True

    def take(self, source: bytes, frames: list[Buffer]) -> Work | None:
        self.on_take()
        name = bytes(frames[0])
        with self._changed:
            self.took[name] = threading.current_thread().name
            self.order.append(name)
            self._changed.notify_all()
        self.on_message(name)
        if name in self.wanted:
            self.wanted[name].come()
        return self.work.get(name) if self.inbox.can_work else None


@contextmanager
def office(*, start: bool = True) -> Iterator[Office]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Office(context)
    try:
        if start:
            made.start()
        yield made
    finally:
        made.close()
        context.term()


def in_thread(name: str, work: Work) -> threading.Thread:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    return thread


@pytest.mark.parametrize("busy_poll_s", [0.0, 0.001])
def test_a_caller_reads_for_itself_and_hands_on_the_rest(busy_poll_s: float) -> None:
    with office(start=False) as here:
        here.inbox.polling.busy_poll_s = busy_poll_s
        wanted = here.wanted[b"mine"] = Wanted()
        for name in (b"a", b"b", b"mine", b"c"):
            here.send(name)
        here.inbox.wait_for(wanted, None)
        assert here.order == [b"a", b"b", b"mine"]
        assert set(here.took.values()) == {threading.current_thread().name}
        here.inbox.wait_for(wanted, None)  # it is there: nothing more is read
        assert here.order == [b"a", b"b", b"mine"]


def test_a_caller_gives_up_at_its_deadline() -> None:
    with office(start=False) as here:
        wanted = Wanted()
        here.inbox.wait_for(wanted, 0.0)
        assert not wanted.done()
        assert not wanted.blocked.is_set()


def test_a_caller_gives_up_at_its_deadline_while_messages_stream_in() -> None:
    with office(start=False) as here:
        for number in range(1, 5001):
            here.send(number.to_bytes(4, "little"))
        here.inbox.wait_for(Wanted(), 0.0)
        here.inbox.wait_for(Wanted(), time.monotonic())
        assert len(here.order) < 5000


def test_a_reader_outlives_work_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    with office() as here:

        def fail() -> None:
            raise SystemExit("of the work")

        for name in (b"1", b"2", b"3"):
            here.work[name] = fail
            here.send(name)
            here.wait_taken(name)
        here.send(b"last")
        here.wait_taken(b"last")
    finalizers.run_pending()
    assert {record.getMessage() for record in caplog.records} == {"a request failed in an unexpected way"}


def test_what_comes_otherwise_ends_the_wait_with_a_message() -> None:
    with office(start=False) as here:
        wanted = Wanted()
        caller = in_thread("caller", lambda: here.inbox.wait_for(wanted, None))
        here.send(b"first")
        assert here.wait_taken(b"first") == "caller"
        wanted.come()
        here.send(b"look")
        caller.join(WAIT_S)
        assert not caller.is_alive()


def test_a_caller_is_blocked_while_another_reads_and_served_by_it() -> None:
    with office(start=False) as here:
        first, second = Wanted(), Wanted()
        here.wanted = {b"1": first, b"2": second}
        reading = in_thread("reading", lambda: here.inbox.wait_for(first, None))
        here.send(b"go")
        here.wait_taken(b"go")
        blocked = in_thread("blocked", lambda: here.inbox.wait_for(second, None))
        assert second.blocked.wait(WAIT_S)
        here.send(b"2")
        blocked.join(WAIT_S)
        assert here.took[b"2"] == "reading"
        here.send(b"1")
        reading.join(WAIT_S)
        assert not blocked.is_alive()
        assert not reading.is_alive()


def test_a_reader_is_called_when_a_caller_leaves_another_blocked() -> None:
    with office(start=False) as here:
        first, second = Wanted(), Wanted()
        here.wanted = {b"1": first, b"2": second}
        reading = in_thread("reading", lambda: here.inbox.wait_for(first, None))
        here.send(b"go")
        here.wait_taken(b"go")
        here.start()  # they find the socket taken, and park
        blocked = in_thread("blocked", lambda: here.inbox.wait_for(second, None))
        assert second.blocked.wait(WAIT_S)
        here.send(b"1")
        reading.join(WAIT_S)
        here.send(b"2")
        assert here.wait_taken(b"2").startswith("reader-")
        blocked.join(WAIT_S)
        assert not blocked.is_alive()


def test_a_reader_does_work_itself_and_another_takes_over_if_it_takes_long() -> None:
    with office() as here:
        begun, may_end = threading.Event(), threading.Event()
        workers: list[str] = []

        def long() -> None:
            workers.append(threading.current_thread().name)
            begun.set()
            assert may_end.wait(WAIT_S)

        here.work[b"long"] = long
        here.send(b"long")
        assert begun.wait(WAIT_S)
        assert here.took[b"long"] == workers[0]
        here.send(b"next")
        other = here.wait_taken(b"next")
        assert other.startswith("reader-")
        assert other != workers[0]
        here.work[b"second"] = long  # nobody is left to take over: it is not given to the reader
        here.send(b"second")
        here.wait_taken(b"second")
        here.send(b"after")
        here.wait_taken(b"after")
        assert len(workers) == 1
        may_end.set()


def test_work_may_wait_for_what_a_message_brings() -> None:
    with office() as here:
        wanted = here.wanted[b"answer"] = Wanted()
        finished = threading.Event()

        def nested() -> None:
            here.inbox.wait_for(wanted, None)
            finished.set()

        here.work[b"ask"] = nested
        here.send(b"ask")
        asker = here.wait_taken(b"ask")
        here.send(b"answer")
        assert finished.wait(WAIT_S)
        assert here.took[b"answer"] in (asker, *(f"reader-{n}" for n in range(READERS)))


def test_messages_keep_their_order_whoever_reads() -> None:
    names = [number.to_bytes(4, "little") for number in range(1, 2001)]
    with office() as here:
        last = here.wanted[names[-1]] = Wanted()
        marks = [here.wanted.setdefault(name, Wanted()) for name in names[::100]]
        callers = [
            in_thread(f"caller-{n}", lambda mark=mark: here.inbox.wait_for(mark, None)) for n, mark in enumerate(marks)
        ]
        for name in names[::7]:
            here.work[name] = lambda: None
        for name in names:
            here.send(name)
        here.inbox.wait_for(last, None)
        for caller in callers:
            caller.join(WAIT_S)
            assert not caller.is_alive()
        assert here.order == names


def test_many_callers_in_a_row_never_wait_for_nobody() -> None:
    """The readers leave the socket to callers that follow each other, and come back when those are gone."""
    with office() as here:
        for number in range(1, 301):
            name = number.to_bytes(4, "little")
            wanted = here.wanted[name] = Wanted()
            here.send(name)
            here.inbox.wait_for(wanted, None)
            assert wanted.done()
        here.send(b"afterwards")
        assert here.wait_taken(b"afterwards").startswith("reader-")
        left = threading.Event()
        here.inbox.on_callers_left = left.set
        here.send(b"again")
        here.wait_taken(b"again")


def test_a_reader_goes_on_reading_for_callers_that_serve_requests() -> None:
    with office() as here:
        here.send(b"first")
        here.wait_taken(b"first")  # a reader reads
        for number in range(20):
            name = b"%d" % number
            here.wanted[name] = Wanted()
            caller = in_thread("caller", partial(here.inbox.wait_for, here.wanted[name], None, lambda: True))
            assert here.wanted[name].blocked.wait(WAIT_S)
            here.send(name)
            caller.join(WAIT_S)
            assert "a reader reads" in here.inbox.describe(), "the next request would lie unread"


def test_closing_from_within_a_message_is_safe() -> None:
    with office(start=False) as here:
        wanted = Wanted()
        here.wanted[b"close"] = wanted
        here.on_take = here.end
        here.send(b"close")
        here.inbox.wait_for(wanted, None)
        assert wanted.done()


# ---- queues ----------------------------------------------------------------------------------------------------------


def serve_in_a_row(here: Office, names: list[bytes]) -> list[bool]:
    """Have work done for messages that lie in a row; whether each was served as one of a queue."""
    queued: list[bool] = []
    done = threading.Event()

    def serve(name: bytes) -> None:
        queued.append(here.inbox.serves_queue_here)
        if name == names[-1]:
            done.set()

    here.work = {name: partial(serve, name) for name in names}
    for name in names:
        here.send(name)
    assert done.wait(WAIT_S)
    return queued


def test_a_reader_knows_whether_it_serves_a_queue_and_sees_to_it_before_it_waits() -> None:
    with office() as here:
        emptied: list[str] = []
        names = [f"{number}".encode() for number in range(200)]
        until(lambda: any(serve_in_a_row(here, names)), "messages are served as a queue")
        here.inbox.on_queue_empty = lambda: emptied.append(threading.current_thread().name)
        serve_in_a_row(here, names)
        until(lambda: here.took[names[-1]] in emptied, "not only the one that keeps watch does")
        assert not here.inbox.serves_queue_here, "this is no reader"


def test_a_reader_serves_a_queue_no_more_once_another_thread_reads() -> None:
    with office() as here:
        left: list[bool] = []
        done = threading.Event()

        def serve() -> None:
            if left or not here.inbox.serves_queue_here:
                return
            wanted = Wanted()
            caller = in_thread("caller", lambda: here.inbox.wait_for(wanted, None))
            until(lambda: not here.inbox.serves_queue_here, "another thread has taken over")
            left.append(True)
            wanted.come()
            here.inbox.wake(wanted)
            caller.join(WAIT_S)
            done.set()

        here.work = {b"serve": serve}
        until(lambda: here.send(b"serve") or here.send(b"serve") or bool(left), "it serves a queue")
        assert done.wait(WAIT_S)


def test_while_a_reader_is_stuck_the_other_one_sees_to_its_queue() -> None:
    with office() as here:
        here.send(b"first")
        here.wait_taken(b"first")
        stuck, seen = threading.Event(), threading.Event()
        names: list[str] = []

        def note() -> None:
            if stuck.is_set() and not seen.is_set():
                names.append(threading.current_thread().name)
                seen.set()

        def get_stuck() -> None:
            stuck.set()
            assert seen.wait(WAIT_S), "what it has left is not seen to"

        here.inbox.on_queue_empty = note
        here.work[b"stuck"] = get_stuck
        until(lambda: here.send(b"stuck") or stuck.is_set(), "a reader does the work itself")
        assert seen.wait(WAIT_S)
        assert names[0].startswith("reader-")


# ---- what is handed on ----------------------------------------------------------------------------------------------


def test_what_a_caller_hands_on_is_done_by_a_reader_in_its_order() -> None:
    """Before all that comes after it, though a reader brings that."""
    with office() as here:
        done: list[bytes] = []
        threads: set[str] = set()

        def do(name: bytes) -> None:
            threads.add(threading.current_thread().name)
            done.append(name)

        def in_order(name: bytes) -> None:
            if here.inbox.must_hand_on:
                here.inbox.hand_on(partial(do, name))
            else:
                do(name)

        names = [f"{number}".encode() for number in range(400)]
        here.on_message = in_order
        for start in range(0, 400, 40):
            wanted = here.wanted[names[start + 20]] = Wanted()
            for name in names[start : start + 40]:
                here.send(name)
            here.inbox.wait_for(wanted, None)
        until(lambda: len(done) == len(names), "all is done")
        assert done == names
        assert all(name.startswith("reader-") for name in threads)


def test_what_is_handed_on_and_raises_keeps_nothing_else_from_being_done(caplog: pytest.LogCaptureFixture) -> None:
    with office() as here:
        done = threading.Event()

        def fail() -> None:
            raise SystemExit("of the work")

        wanted = here.wanted[b"wanted"] = Wanted()
        here.on_message = lambda name: here.inbox.hand_on({b"1": fail, b"2": done.set}.get(name, lambda: None))
        for name in (b"1", b"2", b"wanted"):
            here.send(name)
        here.inbox.wait_for(wanted, None)
        assert done.wait(WAIT_S)
    finalizers.run_pending()
    assert {record.getMessage() for record in caplog.records} == {"a request failed in an unexpected way"}


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def alarm() -> Iterator[list[Work]]:
    """What a signal does, repeatedly, while the list is not empty."""
    handler: list[Work] = []
    before = signal.signal(signal.SIGALRM, lambda *_: handler[0]() if handler else None)
    try:
        yield handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        interrupts.uninstall()
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_may_wait_while_its_thread_reads(alarm: list[Work]) -> None:
    with office(start=False) as here:
        outer, inner = Wanted(), Wanted()
        here.wanted = {b"outer": outer, b"inner": inner}

        def wait() -> None:
            alarm.clear()
            assert not here.inbox.is_read_here, "another thread may read while a handler runs"
            here.send(b"inner")
            here.inbox.wait_for(inner, None)
            here.send(b"outer")

        alarm.append(wait)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        here.inbox.wait_for(outer, None)
        assert here.order == [b"inner", b"outer"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a destructor that was struck
def test_what_a_signal_handler_raises_ends_the_wait_and_loses_no_message(alarm: list[Work]) -> None:
    with office() as here:
        interrupted, sent = 0, 0

        def strike() -> None:
            raise KeyboardInterrupt

        alarm.append(strike)
        while interrupted < 300:
            name = str(sent).encode()
            wanted = here.wanted[name] = Wanted()
            here.send(name)
            sent += 1
            try:
                # Once more after a second: Python ignores what is raised where it runs a destructor.
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4), 1.0)
                while True:
                    here.inbox.wait_for(wanted, None)
                    time.monotonic()
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted += 1
        alarm.clear()
        here.send(b"last")
        here.wait_taken(b"last")
        assert here.order == [*(str(number).encode() for number in range(sent)), b"last"]


def test_a_destructor_may_wait_while_its_thread_takes_a_message() -> None:
    with office(start=False) as here:
        outer, inner = Wanted(), Wanted()
        here.wanted = {b"outer": outer, b"inner": inner}

        class Object:
            def __del__(self) -> None:
                here.inbox.wait_for(inner, None)

        held = [Object()]
        here.on_message = lambda name: held.clear() if name == b"first" else None
        for name in (b"first", b"inner", b"outer"):
            here.send(name)
        here.inbox.wait_for(outer, None)
        assert here.order == [b"first", b"inner", b"outer"]


def test_the_wait_that_a_nested_one_has_ended_ends() -> None:
    """The nested wait takes the message that the outer one waits for."""
    with office(start=False) as here:
        outer, inner = Wanted(), Wanted()
        here.wanted = {b"outer": outer, b"inner": inner}

        class Object:
            def __del__(self) -> None:
                here.send(b"outer")
                here.send(b"inner")
                here.inbox.wait_for(inner, None)

        held = [Object()]
        here.on_message = lambda name: held.clear() if name == b"first" else None
        here.send(b"first")
        here.inbox.wait_for(outer, None)
        assert here.order == [b"first", b"outer", b"inner"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that interrupt")
def test_interrupts_tear_no_message() -> None:
    """What is left of one is not taken for the beginning of the next."""

    is_armed = False

    def strike(*_: object) -> None:
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise KeyboardInterrupt

    count, interrupts = 30_000, 0
    with zmq.Context() as context, context.socket(zmq.PAIR) as sender, context.socket(zmq.PAIR) as receiver:
        receiver.setsockopt(zmq.RCVHWM, 0)
        sender.setsockopt(zmq.SNDHWM, 0)
        receiver.bind("inproc://interrupts")
        sender.connect("inproc://interrupts")
        before = signal.signal(signal.SIGALRM, strike)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        try:
            for _ in range(count):
                try:
                    is_armed = True
                    send_frames(sender, [b"first", b"second", b"third", b"last"])
                    is_armed = False
                except KeyboardInterrupt:
                    interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        whole, torn = [b"first", b"second", b"third", b"last"], []
        came = 0
        while receiver.poll(0):
            frames = receiver.recv_multipart()
            came += frames == whole
            torn += [] if frames == whole else [frames]
    assert all(frames.pop() == b"" and frames == whole[: len(frames)] for frames in torn)
    assert came >= count - interrupts
    assert 0 < len(torn) <= interrupts
