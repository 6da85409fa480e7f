"""What one profile gathers: operations of its threads, calls that were made, and what came back with their answers.

A session belongs to a thread while that thread profiles (`current`). Calls made on the thread are recorded there, and
answers add to it from whatever thread they are opened on; adding is one atomic append.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zrpc.profiling import legacy
from zrpc.profiling.events import Event, shift_into

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.agent.call import Call
    from zrpc.profiling.legacy import Settings


def now_us() -> float:
    """The time of torch's legacy profiler."""
    return time.time_ns() / 1000


class Recording:
    """One call under way, in the session that it was made in."""

    def __init__(self, session: Session, name: str, node_id: int, is_async: bool) -> None:
        self.session = session
        self.name = name
        self._call: Call | None = None
        self._node_id = node_id
        self._is_async = is_async
        self._start_us = now_us()
        self._end_us: float | None = None
        self._remote: list[Event] = []

    def began(self, call: Call) -> None:
        """`call` is the one that is recorded. Once."""
        self._call = call
        call.add_done_callback(self.finish, inline=True)

    def finish(self, _: object = None) -> None:
        """The call is done, or at least its answer is here. The first time counts."""
        if self._end_us is None:
            self._end_us = now_us()

    def add_remote(self, events: list[Event]) -> None:
        """The answer brought what the callee did."""
        self.finish()
        self._remote += events

    def events(self, thread: int) -> list[Event]:
        """The call, made on `thread`, and what it did on the callee; nothing if it is not done."""
        if self._end_us is None:
            if self._call is None or not self._call.done():
                return []
            self.finish()
        end_us = self._end_us or now_us()
        here = Event(self.name, self._start_us, end_us, node_id=self._node_id, thread=thread, is_async=self._is_async)
        shift_us = shift_into(self._remote, self._start_us, end_us)
        return [here, *(event.called_by(self.name, shift_us) for event in self._remote)]


class Session:
    """One profile under way, on the caller or for a caller.

    Attributes:
        settings: what is recorded; the callees record the same.
        is_legacy: it belongs to a profile of the legacy profiler, whose names for calls it uses.
        operations: what its threads did, once their profiler was stopped.
        recordings: the calls that were made.
    """

    def __init__(self, settings: Settings, is_legacy: bool = True) -> None:
        self.settings = settings
        self.is_legacy = is_legacy
        self.operations: list[Event] = []
        self.recordings: list[Recording] = []

    def record(self, name: str, node_id: int, is_async: bool) -> Recording:
        """A call is about to be made."""
        recording = Recording(self, name, node_id, is_async)
        self.recordings.append(recording)
        return recording

    def events(self, node_id: int) -> list[Event]:
        """All of it. `node_id` is this worker's rank."""
        own = [event if event.is_remote else event._replace(node_id=node_id) for event in self.operations]
        thread = own[0].thread if own else 0
        return own + [event for recording in self.recordings for event in recording.events(thread)]


class _Here(threading.local):
    """A thread's part in sessions."""

    current: Session | None = None
    sinks: list[Session] | None = None  # those that get what torch's profiler records on this thread


_here = _Here()


def current() -> Session | None:
    """The session that calls made on this thread belong to."""
    return _here.current


def set_current(session: Session | None) -> None:
    """From now on calls made on this thread belong to `session`."""
    _here.current = session


@contextmanager
def profiling_into(session: Session) -> Iterator[None]:
    """Record what this thread does, and the calls it makes, in `session`; `stop` may end the former earlier."""
    outer, _here.current = _here.current, session
    if _here.sinks is None and not legacy.is_enabled():  # else somebody else profiles this thread, and it is theirs
        legacy.start(session.settings)
        _here.sinks = []
    if _here.sinks is not None:
        _here.sinks.append(session)
    try:
        yield
    finally:
        _here.current = outer
        stop(session)


def stop(session: Session) -> None:
    """Hand out what torch's profiler recorded on this thread, if it was started for `session`."""
    sinks = _here.sinks
    if sinks and sinks[0] is session:
        _here.sinks = None
        recorded = legacy.stop()
        for sink in sinks:
            sink.operations += recorded
