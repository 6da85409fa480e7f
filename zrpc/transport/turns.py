"""Whose turn it is to read: decisions alone, without a thread, a lock or a socket.

What: messages lie on one socket, and one thread at a time reads it. That is a *caller*, which waits for an outcome and
reads until it is there, or one of the *readers*, threads that read when no caller does. A caller that comes while
another thread reads is *blocked*: whoever reads brings its outcome.

To hand a message to another thread takes longer than all the rest of a small call. So readers leave the socket to
callers that follow each other closely. Then one of them keeps *watch*: it looks every few milliseconds, and reads once
nothing has been read since it last looked. Each look takes the interpreter's lock from whoever is at work, so as long
as all goes well it looks half as often each time (measured: autograd steps take 7 % less). The other readers sleep.

Invariants: one thread reads at most. While none does, a reader keeps watch, or is called, or will come by itself. While
one does, it serves those that are blocked; if it leaves before, a reader is called to read. A reader is called once for
each time that it parks. A wait may nest in another one of the same thread, within a destructor: it reads too.

Threads: none. Call it under one lock (`zrpc.transport.inbox`). What readers and callers call all the time makes no
objects: there the garbage collector might run destructors, which may wait, and so want that lock.

Failure: an event that cannot be is a `RuntimeError` that names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

PARK_S, PARK_MAX_S = 0.002, 0.008
"""How long a reader that keeps watch leaves messages unread, at first and in the end."""
STREAK, STREAK_S = 3, 0.01
"""So many callers, each so soon after the last, show that callers follow each other closely."""
UNREAD_MAX_S = 0.02
"""Callers that send will read their answers soon, but for at most so long nothing is read meanwhile."""


class Awaited(Protocol):
    """What a caller waits for."""

    def done(self) -> bool:
        """Whether it is there."""

    def block(self, deadline: float | None) -> None:
        """Wait for it, up to `deadline` (`time.monotonic`), while another thread reads."""


class Place(Enum):
    """Where a reader is."""

    __hash__ = object.__hash__  # that of Enum is written in Python

    AWAY = "it does what a message asked for, or is about to come"
    READING = "it reads"
    WATCHING = "it looks every few milliseconds whether messages lie unread"
    ASLEEP = "it waits to be called"


class Event(Enum):
    """What happens to a reader."""

    __hash__ = object.__hash__

    READ = "it is its turn to read"
    LEAVE = "it stops reading"
    WORK = "it does what was handed on"
    WATCH = "it is to keep watch"
    SLEEP = "it is not needed"


_WATCHING = Place.WATCHING
_PARKED = frozenset((Place.WATCHING, Place.ASLEEP))
_PLACES = {
    (Place.AWAY, Event.READ): Place.READING,
    (Place.AWAY, Event.WORK): Place.AWAY,
    (Place.AWAY, Event.WATCH): Place.WATCHING,
    (Place.AWAY, Event.SLEEP): Place.ASLEEP,
    (Place.READING, Event.LEAVE): Place.AWAY,
    (Place.WATCHING, Event.READ): Place.READING,
    (Place.WATCHING, Event.WORK): Place.AWAY,
    (Place.WATCHING, Event.WATCH): Place.WATCHING,
    (Place.WATCHING, Event.SLEEP): Place.ASLEEP,
    (Place.ASLEEP, Event.READ): Place.READING,
    (Place.ASLEEP, Event.WORK): Place.AWAY,
    (Place.ASLEEP, Event.WATCH): Place.WATCHING,
    (Place.ASLEEP, Event.SLEEP): Place.ASLEEP,
}


_CHANGES = {
    place: {
        event: (after, (after in _PARKED) - (place in _PARKED), (after is _WATCHING) - (place is _WATCHING))
        for (before, event), after in _PLACES.items()
        if before is place
    }
    for place in Place
}
"""The place after an event, and how many more readers are parked, and keep watch, then."""
_NO_CHANGE = (None, 0, 0)
_AWAY = Place.AWAY
_READS = _PLACES[_AWAY, Event.READ]
_LEAVES = _PLACES[_READS, Event.LEAVE]
"""What a reader does for each message, without a look at the rest of the table."""


@dataclass(slots=True)
class _Reader:
    """A reader; while it keeps watch, what it saw when it last looked."""

    number: int
    place: Place = Place.AWAY
    is_called: bool = False
    must_read: bool = False
    leaves_to_callers: bool = False
    watches: bool = False
    activity: int = 0
    num_sent: int = 0
    unread_s: float = 0.0
    pause_s: float = PARK_S


class Turns:
    """Threads are told apart by numbers, as `threading.get_ident` gives them.

    Attributes:
        holder: the thread that reads; 0: none.
        reading_for: what the caller that reads waits for; the innermost of nested waits is the last.
        num_parked: how many readers are there to take over.
    """

    def __init__(self) -> None:
        self._readers: dict[int, _Reader] = {}
        self._all: list[_Reader] = []  # the same
        self.holder = 0
        self.reading_for: list[Awaited] = []
        self.num_parked = 0
        self._num_watching = 0
        self._blocked: list[Awaited] = []
        self._activity = 0
        self._streak = 0
        self._served_at = 0.0

    # ---- what is the case

    @property
    def is_awaited(self) -> bool:
        """Whether a caller is blocked."""
        return bool(self._blocked)

    def is_reader(self, thread: int) -> bool:
        """Whether that thread is one of the readers."""
        return thread in self._readers

    def is_read_for(self, wanted: Awaited) -> bool:
        """Whether a caller reads until `wanted` is done."""
        return any(one is wanted for one in self.reading_for)

    def describe(self) -> str:
        """For the log."""
        places = ", ".join(reader.place.name.lower() for reader in self._readers.values())
        return (
            f"{'a caller' if self.reading_for else 'a reader' if self.holder else 'no thread'} reads, "
            f"the readers are {places or 'not started'}, {len(self._blocked)} callers are blocked"
        )

    # ---- callers

    def caller_waits(self, thread: int, wanted: Awaited) -> bool:
        """A thread waits for `wanted`: whether it reads meanwhile. Else it is blocked, until `caller_unblocked`."""
        if self.holder in (0, thread):
            self.holder = thread
            self.reading_for.append(wanted)
            self._activity += 1
            return True
        self._blocked.append(wanted)
        return False

    def caller_serves(self) -> None:
        """The caller that was blocked last serves a request: the next one comes with a message, which must be read."""
        self._streak = 0

    def caller_unblocked(self, wanted: Awaited) -> None:
        """A caller that was blocked is not any more, whatever came of it."""
        for index, one in enumerate(self._blocked):
            if one is wanted:
                del self._blocked[index]
                return
        raise RuntimeError(f"{wanted} is not blocked")

    def caller_leaves(self, thread: int) -> int:
        """The caller that reads stops. Returns the reader to be woken; 0: none."""
        if self.holder != thread or not self.reading_for:
            raise RuntimeError(f"thread {thread} leaves, and does not read as a caller: {self.describe()}")
        self.reading_for.pop()
        if self.reading_for or (thread in self._readers and self._readers[thread].place is Place.READING):
            return 0  # what it was in the midst of goes on
        self.holder = 0
        if self._num_watching and not self._blocked:
            return 0
        return self._call(must_read=not self._all_served())

    # ---- readers

    def reader_comes(self, thread: int) -> None:
        """A thread becomes a reader."""
        self._readers[thread] = _Reader(thread)
        self._all.append(self._readers[thread])

    def reader_goes(self, thread: int) -> None:
        """It ends."""
        reader = self._readers.pop(thread)
        self._all.remove(reader)
        place = reader.place
        self.num_parked -= place in _PARKED
        self._num_watching -= place is Place.WATCHING

    def next_step(self, thread: int, num_sent: int) -> Place:
        """What a reader that is not reading is to do now.

        Args:
            thread: the reader.
            num_sent: how many requests callers have sent so far.

        Returns:
            `READING`, and it holds the socket; or it is to wait until it is woken, for up to `pause_s`, and asks again.
        """
        reader = self._readers[thread]
        must_read, was_called = reader.must_read, reader.is_called
        reader.is_called = reader.must_read = False
        if self.holder:
            is_lively = reader.watches and reader.activity != self._activity
            if not was_called and not is_lively and not reader.leaves_to_callers:
                return self._park(thread, reader, Event.SLEEP, num_sent)
            reader.leaves_to_callers = False
            return self._park(thread, reader, Event.WATCH, num_sent)
        leaves, reader.leaves_to_callers = reader.leaves_to_callers, False
        if must_read or (reader.place is Place.AWAY and not leaves) or self._lies_unread(reader, num_sent):
            reader.place = _READS if reader.place is _AWAY else self._after(thread, Event.READ)
            reader.watches = False
            self.holder = thread
            return Place.READING
        return self._park(thread, reader, Event.WATCH, num_sent)

    def pause_s(self, thread: int) -> float | None:
        """For how long a reader that is parked waits to be woken in seconds; None: without a limit."""
        reader = self._readers[thread]
        return reader.pause_s if reader.place is Place.WATCHING else None

    def call_for_work(self) -> int:
        """Work is handed on by the thread that reads. Returns the reader to be woken for it; 0: one comes by itself."""
        for thread, reader in self._readers.items():
            if reader.place in _PARKED:
                return thread
        return 0

    def reader_works(self, thread: int) -> None:
        """A reader that does not read does what was handed on; then it asks for its next step."""
        reader = self._readers[thread]
        reader.place, reader.watches = self._after(thread, Event.WORK), False

    def reader_leaves(self, thread: int, *, has_work: bool) -> int:
        """A reader stops reading. Returns the reader to be woken; 0: none.

        Args:
            thread: the reader.
            has_work: it has work to do; else it leaves the socket to callers.
        """
        reader = self._readers[thread]
        reader.place = _LEAVES if reader.place is _READS else self._after(thread, Event.LEAVE)
        reader.leaves_to_callers = not has_work
        self.holder = 0
        if not has_work:
            return 0  # it keeps watch itself
        self._activity += 1
        return 0 if self._num_watching else self._call(must_read=False)

    def follows_closely(self, now: float) -> bool:
        """A caller's outcome was brought by a reader. Whether callers follow each other closely, and none is left."""
        if not self._all_served():
            return False
        self._streak = self._streak + 1 if now - self._served_at < STREAK_S else 0
        self._served_at = now
        return self._streak >= STREAK

    # ---- below

    def _all_served(self) -> bool:
        return not self._blocked or all(wanted.done() for wanted in self._blocked)

    def _call(self, *, must_read: bool) -> int:
        """No thread reads now: see to it that a reader keeps watch, or reads. Returns the one to be woken, or 0."""
        called: _Reader | None = None
        index = 0
        while index < len(self._all):
            reader = self._all[index]
            index += 1
            if reader.place is Place.WATCHING or reader.is_called:
                if not must_read:
                    return 0
                called = reader
                break
            if reader.place is Place.ASLEEP:
                called = reader
        if called is None:
            return 0
        called.is_called, called.must_read = True, must_read or called.must_read
        return called.number

    def _lies_unread(self, reader: _Reader, num_sent: int) -> bool:
        """Whether nothing was read, or will be soon, since the reader last looked."""
        if not reader.watches:
            return False
        if reader.activity != self._activity:
            reader.unread_s = 0.0
            reader.pause_s = min(2 * reader.pause_s, PARK_MAX_S)
            return False
        reader.unread_s += reader.pause_s
        reader.pause_s = PARK_S
        return reader.num_sent == num_sent or reader.unread_s > UNREAD_MAX_S

    def _park(self, thread: int, reader: _Reader, event: Event, num_sent: int) -> Place:
        reader.place = self._after(thread, event)
        if event is Event.SLEEP:
            reader.watches = False
            return reader.place
        if not reader.watches:
            reader.watches, reader.unread_s, reader.pause_s = True, 0.0, PARK_S
        elif self.holder and reader.activity != self._activity:
            reader.unread_s = 0.0
            reader.pause_s = min(2 * reader.pause_s, PARK_MAX_S)
        reader.activity, reader.num_sent = self._activity, num_sent
        return reader.place

    def _after(self, thread: int, event: Event) -> Place:
        place = self._readers[thread].place
        after, parked, watching = _CHANGES[place].get(event, _NO_CHANGE)
        if after is None:
            raise RuntimeError(f"reader {thread} is {place.name}, and {event.name} cannot be there: {self.describe()}")
        self.num_parked += parked
        self._num_watching += watching
        return after
