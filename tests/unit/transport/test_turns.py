"""Whose turn it is to read, over any interleaving of readers, callers, messages, losses and interrupts. No threads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zrpc.transport.turns import PARK_MAX_S, PARK_S, STREAK, Place, Turns

READERS = (1, 2)
CALLERS = (11, 12, 13)


class Wanted:
    def __init__(self) -> None:
        self.is_done = False

    def done(self) -> bool:
        return self.is_done

    def block(self, deadline: float | None) -> None:
        raise AssertionError("no thread waits here")


@dataclass
class Reader:
    """A reader thread: what it does, and for how long it waits to be woken (None: until then)."""

    does: str = "asks"
    pause_s: float | None = None
    is_woken: bool = False


@dataclass
class Caller:
    """A caller thread: its waits, the innermost last, each with whether it reads."""

    waits: list[tuple[Wanted, bool]] = field(default_factory=list)


class Threads(RuleBasedStateMachine):
    """Threads that do what `Turns` says, one step at a time, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.readers = {number: Reader() for number in READERS}
        self.callers = {number: Caller() for number in CALLERS}
        self.messages: deque[Wanted | None] = deque()  # None: work
        self.unsent: list[Wanted] = []  # outcomes that no message brings yet
        self.now = 0.0
        self.num_sent = 0
        for number in READERS:
            self.turns.reader_comes(number)

    # ---- what threads do

    def wake(self, reader: int) -> None:
        if reader:
            self.readers[reader].is_woken = True

    def take(self) -> Wanted | None:
        message = self.messages.popleft()
        if message is not None:
            message.is_done = True
        return message

    def step_reader(self, number: int) -> bool:
        """One step of a reader; false: it has nothing to do."""
        reader = self.readers[number]
        if reader.does == "is parked":
            if not reader.is_woken and reader.pause_s is None:
                return False
            reader.does, reader.is_woken = "asks", False
        elif reader.does == "works":
            reader.does = "asks"
        elif reader.does == "asks":
            place = self.turns.next_step(number, self.num_sent)
            reader.pause_s = self.turns.pause_s(number)
            reader.does = "reads" if place is Place.READING else "is parked"
        elif not self.messages:
            return False
        elif self.take() is None:
            if self.turns.num_parked:
                self.wake(self.turns.reader_leaves(number, has_work=True))
                reader.does = "works"
        elif self.turns.is_awaited and self.turns.follows_closely(self.now):
            self.wake(self.turns.reader_leaves(number, has_work=False))
            reader.does = "asks"
        return True

    def step_caller(self, number: int) -> bool:
        """One step of a caller; false: it has nothing to do."""
        caller = self.callers[number]
        if not caller.waits:
            return False
        wanted, reads = caller.waits[-1]
        if wanted.is_done:
            self.stop_waiting(number)
        elif reads and self.messages:
            self.take()
        else:
            return False
        return True

    def stop_waiting(self, number: int) -> None:
        wanted, reads = self.callers[number].waits.pop()
        if reads:
            self.wake(self.turns.caller_leaves(number))
        else:
            self.turns.caller_unblocked(wanted)

    # ---- what happens

    @rule(number=st.sampled_from(READERS), after_s=st.sampled_from([0.0, 0.001, 0.02]))
    def a_reader_goes_on(self, number: int, after_s: float) -> None:
        self.now += after_s
        self.step_reader(number)

    @rule(number=st.sampled_from(CALLERS))
    def a_caller_goes_on(self, number: int) -> None:
        self.step_caller(number)

    @rule(number=st.sampled_from(CALLERS), shares=st.booleans())
    def a_caller_waits(self, number: int, shares: bool) -> None:
        """For something new, or for what another one waits for; within a wait it does so in a destructor."""
        caller = self.callers[number]
        if len(caller.waits) > 2 or (caller.waits and not caller.waits[-1][1]):
            return
        others = [wait[0] for other in self.callers.values() for wait in other.waits if other is not caller]
        wanted = others[0] if shares and others else Wanted()
        if wanted not in others:
            self.unsent.append(wanted)
        caller.waits.append((wanted, self.turns.caller_waits(number, wanted)))

    @precondition(lambda self: self.unsent)
    @rule(data=st.data())
    def an_answer_comes(self, data: Any) -> None:
        self.messages.append(self.unsent.pop(data.draw(st.integers(0, len(self.unsent) - 1))))

    @rule()
    def a_request_comes(self) -> None:
        self.messages.append(None)

    @precondition(lambda self: self.unsent)
    @rule(data=st.data())
    def a_loss_ends_what_is_awaited(self, data: Any) -> None:
        wanted = self.unsent.pop(data.draw(st.integers(0, len(self.unsent) - 1)))
        wanted.is_done = True
        reads = [number for number, caller in self.callers.items() if (wanted, True) in caller.waits]
        assert self.turns.is_read_for(wanted) == bool(reads), "the caller that reads for it can be woken"

    @rule(number=st.sampled_from(CALLERS))
    def a_signal_interrupts(self, number: int) -> None:
        while self.callers[number].waits:
            self.stop_waiting(number)

    @rule()
    def callers_send(self) -> None:
        self.num_sent += 1

    # ---- what always holds

    @invariant()
    def one_thread_reads_at_most(self) -> None:
        reading = [number for number, reader in self.readers.items() if reader.does == "reads"]
        reading += [number for number, caller in self.callers.items() if any(reads for _, reads in caller.waits)]
        assert reading == ([self.turns.holder] if self.turns.holder else [])

    @invariant()
    def a_reader_comes_if_no_thread_reads(self) -> None:
        if not self.turns.holder:
            assert any(
                reader.does != "is parked" or reader.is_woken or reader.pause_s is not None
                for reader in self.readers.values()
            ), self.turns.describe()

    @invariant()
    def pauses_are_short(self) -> None:
        assert all(
            PARK_S <= reader.pause_s <= PARK_MAX_S for reader in self.readers.values() if reader.pause_s is not None
        )

    @invariant()
    def the_parked_are_counted(self) -> None:
        places = self.turns.describe().split("the readers are ")[1].split(", ")
        assert self.turns.num_parked == places.count("watching") + places.count("asleep")

    def teardown(self) -> None:
        """If every thread goes on, all messages are read, and all waits end whose outcome came."""
        for _ in range(2000):
            self.now += 0.005
            steps = [self.step_reader(number) for number in READERS]
            steps += [self.step_caller(number) for number in CALLERS]
            waiting = [caller.waits[-1] for caller in self.callers.values() if caller.waits]
            if not self.messages and not any(wanted.is_done for wanted, _ in waiting):
                return
        raise AssertionError(f"{len(self.messages)} messages lie unread: {self.turns.describe()}")


TestThreads = Threads.TestCase
TestThreads.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_events_that_cannot_be_name_what_is_wrong() -> None:
    turns = Turns()
    turns.reader_comes(1)
    with pytest.raises(RuntimeError, match="reader 1 is AWAY, and LEAVE cannot be there: no thread reads"):
        turns.reader_leaves(1, has_work=True)
    with pytest.raises(RuntimeError, match="thread 11 leaves, and does not read as a caller"):
        turns.caller_leaves(11)
    with pytest.raises(RuntimeError, match="is not blocked"):
        turns.caller_unblocked(Wanted())


def test_a_reader_leaves_the_socket_to_callers_that_follow_each_other_closely() -> None:
    turns = Turns()
    turns.reader_comes(1)
    assert turns.next_step(1, 0) is Place.READING
    for number in range(STREAK + 1):
        wanted = Wanted()
        assert not turns.caller_waits(11, wanted)
        wanted.is_done = True
        assert turns.follows_closely(1.0 + number / 1000) == (number == STREAK)
        turns.caller_unblocked(wanted)
    assert turns.reader_leaves(1, has_work=False) == 0
    assert turns.next_step(1, 0) is Place.WATCHING
    assert turns.pause_s(1) == PARK_S
    for _ in range(5):  # callers read, one after the other: it looks less and less often
        assert turns.caller_waits(11, Wanted())
        assert turns.caller_leaves(11) == 0
        assert turns.next_step(1, 0) is Place.WATCHING
    assert turns.pause_s(1) == PARK_MAX_S
    assert turns.next_step(1, 1) is Place.WATCHING, "a caller has sent, and will read"
    assert turns.next_step(1, 1) is Place.READING, "nothing was read or sent"


def test_a_reader_goes_on_reading_while_callers_that_serve_requests_follow_each_other() -> None:
    turns = Turns()
    turns.reader_comes(1)
    assert turns.next_step(1, 0) is Place.READING
    for number in range(3 * STREAK):
        wanted = Wanted()
        assert not turns.caller_waits(11, wanted)
        turns.caller_serves()
        wanted.is_done = True
        assert not turns.follows_closely(1.0 + number / 1000)
        turns.caller_unblocked(wanted)


def test_a_caller_that_leaves_another_one_blocked_calls_a_reader_to_read() -> None:
    turns = Turns()
    assert turns.caller_waits(11, Wanted())
    turns.reader_comes(1)
    assert turns.next_step(1, 0) is Place.ASLEEP
    assert not turns.caller_waits(12, Wanted())
    assert turns.caller_leaves(11) == 1
    assert turns.next_step(1, 0) is Place.READING


def test_the_reader_that_a_nested_wait_was_made_on_goes_on_reading() -> None:
    turns = Turns()
    turns.reader_comes(1)
    assert turns.next_step(1, 0) is Place.READING
    assert turns.caller_waits(1, Wanted())
    assert turns.reading_for
    assert turns.caller_leaves(1) == 0
    assert turns.holder == 1
    assert not turns.reading_for
