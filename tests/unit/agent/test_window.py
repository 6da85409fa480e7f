"""The window: what any history of requests, answers, time-outs and losses may and may not do to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from zrpc.agent.window import COUNTED_MIN_NBYTES, UNKNOWN, Window

KB = 1000
SMALL = 100

nbytes = st.one_of(st.integers(0, COUNTED_MIN_NBYTES), st.integers(COUNTED_MIN_NBYTES + 1, 60 * KB))
EVENTS = st.one_of(
    st.tuples(st.just("send"), nbytes),
    st.tuples(st.just("send"), nbytes),
    st.tuples(st.just("force"), nbytes),
    st.tuples(st.just("answer"), st.integers(0, 63)),
    st.tuples(st.just("answer"), st.integers(0, 63)),
    st.tuples(st.just("answer_again"), st.integers(0, 63)),
    st.tuples(st.just("give_up"), st.integers(0, 63)),
)


@dataclass
class Model:
    """A caller and its window, and what a plain count says that it must hold."""

    max_nbytes: int
    max_calls: int
    next_id: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    on_the_way: list[int] = field(default_factory=list)
    forced: set[int] = field(default_factory=set)
    lines: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    answered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.window: Window[int] = Window(self.max_nbytes, self.max_calls)

    def counted(self, call: int) -> int:
        return self.sizes[call] if self.sizes[call] > COUNTED_MIN_NBYTES else 0

    def new(self, size: int) -> int:
        self.next_id += 1
        self.sizes[self.next_id] = size
        return self.next_id

    def send(self, size: int) -> None:
        call = self.new(size)
        if self.window.take(call, size) or self.window.ask(call, size):
            self.on_the_way.append(call)
            return
        self.lines[self.counted(call) > 0].append(call)
        self.freed(self.window.line_up(call, size, call))

    def force(self, size: int) -> None:
        call = self.new(size)
        self.window.force(call, size)
        self.on_the_way.append(call)
        self.forced.add(call)

    def answer(self, which: int) -> None:
        if not self.on_the_way:
            return
        call = self.on_the_way.pop(which % len(self.on_the_way))
        self.answered.append(call)
        left = self.window.forget(call)
        assert left == self.counted(call)
        if left or self.window.num_waiting:
            self.freed(self.window.release(left))

    def answer_again(self, which: int) -> None:
        if self.answered:
            assert self.window.forget(self.answered[which % len(self.answered)]) == UNKNOWN

    def give_up(self, which: int) -> None:
        everybody = sorted([*self.lines[0], *self.lines[1]])
        if not everybody:
            return
        call = everybody[which % len(everybody)]
        self.lines[self.counted(call) > 0].remove(call)
        self.freed(self.window.withdraw(call))

    def freed(self, calls: list[int]) -> None:
        """In each line, whoever came first goes first."""
        for call in calls:
            line = self.lines[self.counted(call) > 0]
            assert line.pop(0) == call
            self.on_the_way.append(call)

    def fits(self, call: int) -> bool:
        held = sum(map(self.counted, self.on_the_way))
        room = not self.counted(call) or not held or not self.max_nbytes or held + self.counted(call) <= self.max_nbytes
        return room and (not self.max_calls or len(self.on_the_way) < self.max_calls)

    def check(self) -> None:
        window = self.window
        held = sum(map(self.counted, self.on_the_way))
        assert window.nbytes == held
        assert window.num_calls == len(self.on_the_way)
        assert window.num_waiting == len(self.lines[0]) + len(self.lines[1])
        polite = [self.counted(call) for call in self.on_the_way if call not in self.forced]
        if self.max_nbytes:  # what was forced counts, but nobody can be blamed for it
            assert sum(polite) <= max(self.max_nbytes, max(polite, default=0))
        if self.max_calls:
            assert len(polite) <= self.max_calls
        for line in self.lines:
            assert not line or not self.fits(line[0]), "who comes first could go, and waits"


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([0, 10 * KB, 50 * KB]), st.integers(0, 4), st.lists(EVENTS, max_size=60))
def test_every_history_keeps_within_the_limits_and_nobody_waits_for_nothing(
    max_nbytes: int, max_calls: int, history: list[tuple[str, int]]
) -> None:
    model = Model(max_nbytes, max_calls)
    for event, argument in history:
        getattr(model, event)(argument)
        model.check()
    for _ in range(model.next_id):  # everything is answered in the end: then everybody has gone, and nothing is left
        model.answer(0)
        model.check()
    assert (model.window.nbytes, model.window.num_calls, model.window.num_waiting) == (0, 0, 0)


@given(st.lists(EVENTS, max_size=30), st.lists(st.integers(0, 60 * KB), max_size=5))
def test_a_closed_window_frees_everybody_and_counts_nothing(history: list[tuple[str, int]], later: list[int]) -> None:
    model = Model(10 * KB, 3)
    for event, argument in history:
        getattr(model, event)(argument)
    waiting = [*model.lines[0], *model.lines[1]]
    assert model.window.close() == waiting
    assert (model.window.nbytes, model.window.num_calls, model.window.num_waiting) == (0, 0, 0)
    for call in model.on_the_way:  # what was on the way is answered, or given up, all the same
        assert model.window.forget(call) == UNKNOWN
        assert model.window.release(0) == []
    for size in later:
        assert model.window.ask(model.new(size), size)
    assert model.window.nbytes == 0


def test_a_message_larger_than_the_window_goes_alone() -> None:
    window: Window[str] = Window(10 * KB, 0)
    assert window.ask(1, 100 * KB)
    assert not window.ask(2, 5 * KB)
    assert window.line_up(2, 5 * KB, "second") == []
    assert window.take(3, SMALL) is False, "somebody waits: it must ask"
    assert window.ask(3, SMALL), "a small one passes those that wait for bytes"
    assert window.release(window.forget(1)) == ["second"]


def test_a_large_message_is_not_overtaken_by_a_smaller_one_that_would_fit() -> None:
    window: Window[str] = Window(10 * KB, 0)
    assert window.ask(1, 6 * KB)
    assert not window.ask(2, 9 * KB)
    assert window.line_up(2, 9 * KB, "large") == []
    assert not window.ask(3, 5 * KB)
    assert window.line_up(3, 5 * KB, "smaller") == []
    assert window.release(window.forget(1)) == ["large"]
    assert window.release(window.forget(2)) == ["smaller"]


def test_who_waited_longer_gets_a_free_place_first() -> None:
    window: Window[str] = Window(0, 1)
    assert window.ask(1, SMALL)
    assert window.line_up(2, 5 * KB, "large") == []
    assert window.line_up(3, SMALL, "small") == []
    assert window.line_up(4, 5 * KB, "later") == []
    freed = []
    for call in (1, 2, 3):
        freed += window.release(window.forget(call))
    assert freed == ["large", "small", "later"]
