"""Where signal handlers run on the main thread. Real signals."""

from __future__ import annotations

import linecache
import os
import random
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.waiting import until
from zrpc import finalizers, interrupts
from zrpc.wakeups import WakeUps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0


class Strike(BaseException):
    """What a handler raises."""


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """Handlers of two signals are there: one notes that it ran, the other one that, and raises."""
    noted: list[str] = []

    def note(*_: object) -> None:
        noted.append("noted")

    def strike(*_: object) -> None:
        noted.append("struck")
        raise Strike

    before = signal.signal(signal.SIGUSR1, note), signal.signal(signal.SIGUSR2, strike)
    interrupts.install()
    try:
        yield noted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        interrupts.uninstall()
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])


def note_soon(after_s: float = 0.02, signum: int = signal.SIGUSR1) -> threading.Thread:
    def send() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_outside_of_sections_a_handler_runs_at_once(ran: list[str]) -> None:
    signal.raise_signal(signal.SIGUSR1)
    assert ran == ["noted"]
    with pytest.raises(Strike):
        signal.raise_signal(signal.SIGUSR2)


@pytest.mark.parametrize("section", [interrupts.deferred, interrupts.held])
def test_within_a_section_it_runs_at_the_end(ran: list[str], section: Any) -> None:
    reached: list[bool] = []

    def work() -> None:
        with section:
            with section:
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR2)
            reached.append(ran == [])

    with pytest.raises(Strike):
        work()
    assert reached == [True]
    assert ran == ["noted", "struck"]


def test_what_fails_in_a_section_is_the_context_of_what_a_handler_raises(ran: list[str]) -> None:
    def work() -> None:
        with interrupts.deferred:
            signal.raise_signal(signal.SIGUSR2)
            raise ValueError("of the section")

    with pytest.raises(Strike) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


def test_a_wait_ends_and_the_handler_runs_where_nothing_is_held(ran: list[str]) -> None:
    held: list[str] = []
    lock = threading.Lock()
    lock.acquire()
    rounds = []

    def wait() -> bool:
        rounds.append(list(ran))
        held.append("something")
        try:
            return interrupts.wait(lambda: lock.acquire(timeout=WAIT_S if len(rounds) == 1 else 0.01))
        finally:
            held.clear()

    thread = note_soon()
    assert interrupts.restart(wait) is False
    thread.join()
    assert rounds == [[], ["noted"]]


def test_what_the_handler_raises_ends_the_wait(ran: list[str]) -> None:
    thread = note_soon(signum=signal.SIGUSR2)
    with pytest.raises(Strike):
        interrupts.restart(lambda: interrupts.wait(lambda: time.sleep(WAIT_S)))
    thread.join()


def test_a_section_that_is_held_is_not_interrupted_where_it_waits(ran: list[str]) -> None:
    with interrupts.held:
        thread = note_soon(0.0)
        thread.join()
        assert interrupts.restart(lambda: interrupts.wait(lambda: "waited")) == "waited"
        interrupts.run_handlers()
        interrupts.check()
        assert ran == []
    assert ran == ["noted"]


def test_a_loop_that_waits_can_look_for_signals(ran: list[str]) -> None:
    with interrupts.deferred:
        interrupts.check()
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(interrupts.Interrupted):
            interrupts.check()
        interrupts.run_handlers()
        interrupts.check()
        assert ran == ["noted"]


def test_handlers_may_use_sections_and_waits_of_their_own(ran: list[str]) -> None:
    def nested(*_: object) -> None:
        with interrupts.deferred:
            interrupts.restart(lambda: interrupts.wait(lambda: None))
        ran.append("nested")

    signal.signal(signal.SIGUSR1, nested)
    thread = note_soon()
    done = threading.Event()
    interrupts.restart(lambda: interrupts.wait(lambda: done.wait(0.2)))
    thread.join()
    assert ran == ["nested"]


def test_a_handler_that_is_set_later_is_deferred_from_the_next_wait_on(ran: list[str]) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: ran.append("new"))
    interrupts.restart(lambda: interrupts.wait(lambda: None))
    with interrupts.deferred:
        signal.raise_signal(signal.SIGUSR1)
        assert ran == []
    assert ran == ["new"]


def test_a_handler_that_is_set_later_is_deferred_after_a_few_sections(ran: list[str]) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: ran.append("new"))
    for _ in range(8):
        with interrupts.deferred:
            pass
    with interrupts.deferred:
        signal.raise_signal(signal.SIGUSR1)
        assert ran == []
    assert ran == ["new"]


def test_the_handlers_are_put_back(ran: list[str]) -> None:
    mine = signal.getsignal(signal.SIGUSR1)
    interrupts.uninstall()
    assert signal.getsignal(signal.SIGUSR1) is not mine
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts.install()
    assert signal.getsignal(signal.SIGUSR1).__wrapped__ is not mine  # type: ignore[union-attr]


def test_on_other_threads_nothing_is_deferred(ran: list[str]) -> None:
    """The handler runs on the main thread, which is in no section, while the other thread is in one."""
    entered, may_leave = threading.Event(), threading.Event()

    def be_in_a_section() -> None:
        with interrupts.deferred, interrupts.held:
            entered.set()
            interrupts.check()
            assert interrupts.wait(lambda: may_leave.wait(WAIT_S))

    thread = threading.Thread(target=be_in_a_section)
    thread.start()
    assert entered.wait(WAIT_S)
    signal.raise_signal(signal.SIGUSR1)
    assert ran == ["noted"]
    may_leave.set()
    thread.join()


def test_a_signal_that_comes_in_a_destructor_is_put_off(ran: list[str]) -> None:
    ended = []

    class Object:
        @interrupts.uninterrupted
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGUSR2)
            ended.append(True)

    Object()
    assert ended
    assert ran == []
    control = threading.Timer(0.1, finalizers.run_pending)
    control.start()
    with pytest.raises(Strike):
        until(lambda: False, "the signal comes again", within_s=WAIT_S)
    control.join()
    assert ran == ["struck"]


def test_ctrl_c_pressed_again_and_again_interrupts_a_section_that_does_not_end() -> None:
    """Code of users may run there."""
    interrupts.install()

    def never_end() -> None:
        with interrupts.deferred:
            while True:
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.01)

    try:
        with pytest.raises(KeyboardInterrupt):
            never_end()
        with pytest.raises(KeyboardInterrupt), interrupts.deferred:
            signal.raise_signal(signal.SIGINT)  # this one ends
    finally:
        interrupts.uninstall()


def test_handlers_that_were_deferred_run_in_the_midst_of_a_section_that_lets_them(ran: list[str]) -> None:
    with interrupts.deferred:
        signal.raise_signal(signal.SIGUSR1)
        interrupts.run_handlers()
        assert ran == ["noted"]
        signal.raise_signal(signal.SIGUSR1)
        assert ran == ["noted"]


def test_wherever_a_handler_raises_later_sections_defer(ran: list[str]) -> None:
    """At each line that Python runs while a section lets handlers run."""
    at, reached = 0, True
    while reached:
        left, reached = at, False

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left, reached
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            left -= event == "line" and "no handler runs between" not in line
            if left == -1 and not reached:
                reached = True
                signal.raise_signal(signal.SIGUSR2)
            return trace

        sys.settrace(trace)
        try:
            with interrupts.deferred:
                signal.raise_signal(signal.SIGUSR1)
                interrupts.run_handlers()
        except Strike:
            pass
        finally:
            sys.settrace(None)
        ran.clear()
        with interrupts.deferred:
            signal.raise_signal(signal.SIGUSR1)
            assert ran == [], f"struck at line event {at}"
        assert ran == ["noted"]
        at += 1


def test_a_forked_child_is_in_no_section(ran: list[str]) -> None:
    with interrupts.deferred:
        pid = os.fork()
        if not pid:
            signal.raise_signal(signal.SIGUSR1)
            os._exit(0 if ran == ["noted"] else 1)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a destructor that was struck
def test_interrupts_at_random_moments_leave_no_section_in_the_middle(ran: list[str]) -> None:
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGUSR2).__wrapped__)  # type: ignore[union-attr]
    counts = {"begun": 0, "ended": 0}
    struck = 0
    lock = threading.Lock()
    while struck < 500:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-4), 1.0)  # a destructor may swallow one
            while True:
                interrupts.restart(lambda: interrupts.wait(lambda: time.sleep(1e-5)))
                with interrupts.deferred, lock:
                    counts["begun"] += 1
                    sum(range(50))
                    counts["ended"] += 1
        except Strike:
            signal.setitimer(signal.ITIMER_REAL, 0)
            struck += 1
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert counts["begun"] == counts["ended"]
    assert not lock.locked()


# ---- wake-ups -------------------------------------------------------------------------------------------------------


def waiting(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_each_thread_that_waits_is_woken() -> None:
    wake_ups, done = WakeUps(), threading.Event()
    threads = [waiting(lambda: wake_ups.wait(done.is_set, None)) for _ in range(5)]
    done.set()
    until(lambda: wake_ups.wake_all() or not any(thread.is_alive() for thread in threads), "all are woken")
    wake_ups.wait(done.is_set, None)  # it is done: it need not be woken


def test_waiting_ends_at_the_deadline() -> None:
    wake_ups = WakeUps()
    wake_ups.wait(lambda: False, time.monotonic())
    wake_ups.wait(lambda: False, time.monotonic() + 0.01)


def test_a_thread_that_is_interrupted_takes_no_others_wake_up(ran: list[str]) -> None:
    wake_ups, done = WakeUps(), threading.Event()
    other = waiting(lambda: wake_ups.wait(done.is_set, None))
    thread = note_soon(signum=signal.SIGUSR2)
    with pytest.raises(Strike):
        interrupts.restart(lambda: wake_ups.wait(done.is_set, None))
    thread.join()
    done.set()
    wake_ups.wake_all()
    other.join(WAIT_S)
    assert not other.is_alive()
