"""Time limits: each key expires once, in order, unless the table is closed first."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.waiting import until
from zrpc.agent.deadlines import SWEEP_MIN_COUNT, Deadlines
from zrpc.control import ControlThread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0


class Expired:
    """The keys that expired, in order."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, key: int) -> None:
        with self._changed:
            self.keys.append(key)
            self._changed.notify_all()

    def wait(self, count: int) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.keys) >= count, WAIT_S)
            return list(self.keys)


@contextmanager
def deadlines(
    is_live: Callable[[int], bool] = lambda _: True,
    expire: Callable[[int], None] | None = None,
    num_live: Callable[[], int] = lambda: 1 << 30,
) -> Iterator[tuple[Deadlines, Expired]]:
    expired = Expired()
    control = ControlThread(lambda: made.run_due())
    made = Deadlines(expire or expired, is_live, num_live, control.wake)
    control.start()
    try:
        yield made, expired
    finally:
        made.close()
        control.close(WAIT_S)


def test_keys_expire_in_the_order_of_their_time() -> None:
    with deadlines() as (table, expired):
        for key, after_s in ((3, 0.5), (1, 0.0), (2, 0.25)):
            table.add(key, after_s)
        assert expired.wait(3) == [1, 2, 3]


def test_a_nearer_deadline_wakes_the_thread_that_sleeps_toward_a_farther_one() -> None:
    with deadlines() as (table, expired):
        table.add(1, 3600.0)
        table.add(2, 0.0)
        assert expired.wait(1) == [2]


def test_keys_of_one_tick_all_expire() -> None:
    with deadlines() as (table, expired):
        for key in range(1000):
            table.add(key, 0.01)
        assert sorted(expired.wait(1000)) == list(range(1000))


def test_keys_may_be_added_by_what_expires() -> None:
    expired = Expired()

    def again(key: int) -> None:
        expired(key)
        if key < 3:
            table.add(key + 1, 0.0)

    with deadlines(expire=again) as (table, _):
        table.add(0, 0.0)
        assert expired.wait(4) == [0, 1, 2, 3]


def test_those_that_have_ended_do_not_pile_up() -> None:
    live: set[int] = set()
    with deadlines(live.__contains__) as (table, expired):
        for key in range(20 * SWEEP_MIN_COUNT):
            live.add(key)
            table.add(key, 0.5 if key % 1000 == 0 else 3600.0 + key)
            if key % 1000:
                live.remove(key)
        until(
            lambda: len(table) <= 2 * SWEEP_MIN_COUNT + len(live),
            "those that have ended are swept out",
            lambda: len(table),
        )
        assert expired.wait(len(live)) == sorted(live)


def test_those_that_have_not_ended_are_kept_however_many() -> None:
    count = 5 * SWEEP_MIN_COUNT
    with deadlines() as (table, expired):
        for key in range(count):
            table.add(key, 1.0)
        assert sorted(expired.wait(count)) == list(range(count))


def test_nothing_expires_after_the_close() -> None:
    with deadlines() as (table, expired):
        table.add(1, 0.0)
        assert expired.wait(1) == [1]
        for _ in range(2):
            table.close()
        table.add(2, 0.0)
        assert table.run_due() is None
    assert expired.keys == [1]


def test_what_expires_may_close_the_table() -> None:
    closed = threading.Event()

    def close(_: int) -> None:
        table.close()
        closed.set()

    with deadlines(expire=close) as (table, _):
        table.add(1, 0.0)
        assert closed.wait(WAIT_S)


def test_a_signal_handler_may_add_where_it_interrupts_adding() -> None:
    """To add takes no lock that a handler on the same thread could wait for."""
    with deadlines() as (table, expired):
        previous = signal.signal(signal.SIGALRM, lambda *_: table.add(1, 0.0))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        try:
            for _ in range(20_000):
                table.add(2, 0.0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, previous)
        table.add(3, 0.01)
        assert expired.wait(20_001)
        until(lambda: 3 in expired.keys, "the last one expires")


def test_what_has_ended_is_swept_out_though_nothing_is_added_any_more() -> None:
    """As many as were under way at the last sweep are not kept until their time is over."""
    live: set[int] = set(range(8 * SWEEP_MIN_COUNT))
    with deadlines(live.__contains__, num_live=lambda: len(live)) as (table, _):
        for key in range(8 * SWEEP_MIN_COUNT):
            table.add(key, 3600.0)
        live.clear()
        until(lambda: len(table) <= SWEEP_MIN_COUNT, "what has ended is swept out", lambda: len(table))
