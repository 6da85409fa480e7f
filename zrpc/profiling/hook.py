"""What profiling adds to messages: a request says what to record, its answer brings what was recorded."""

from __future__ import annotations

import itertools
import reprlib
import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from zrpc.errors import ProtocolError
from zrpc.profiling.events import Event
from zrpc.profiling.legacy import Settings
from zrpc.profiling.session import Recording, Session, profiling_into, stop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.agent.agent import Agent
    from zrpc.ids import WorkerInfo
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload


class _Outgoing(threading.local):
    """The recording of the call that this thread is about to send."""

    recording: Recording | None = None


_outgoing = _Outgoing()


@contextmanager
def sending(recording: Recording) -> Iterator[None]:
    """The request sent in the body is the one that `recording` records."""
    ProfilingHook.is_idle = False
    _outgoing.recording = recording
    try:
        yield
    finally:
        _outgoing.recording = None


class ProfilingHook:
    """Rides on the calls of one agent. Its tables change by one atomic operation each.

    It is idle until this process records a call.
    """

    key = "profile"
    is_idle = True

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._numbers = itertools.count(1)
        self._open: WeakValueDictionary[int, Recording] = WeakValueDictionary()  # sessions keep recordings alive
        self._serving: dict[int, Session] = {}

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """See `CallHook.send`."""
        if request_meta is None:
            return self._ask()
        session = self._serving.pop(id(request_meta), None)
        if session is None:
            return None
        stop(session)
        assert isinstance(request_meta, list)
        return [request_meta[0], [list(event) for event in session.events(self._agent.info.id)]]

    def receive(self, source: WorkerInfo, meta: Any, payload: Payload, is_reply: bool) -> AbstractContextManager[None]:
        """See `CallHook.receive`."""
        try:
            number, content = meta
            if not is_reply:
                session = self._serving[id(meta)] = Session(Settings(*content))
                return profiling_into(session)
            recording = self._open.pop(number, None)
            events = [Event(*fields) for fields in content]
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"{reprlib.repr(meta)} says nothing of a profile") from error
        if recording is not None:
            recording.add_remote(events)
        return nullcontext()

    def carry_over(self) -> None:
        """See `CallHook.carry_over`."""

    def _ask(self) -> object | None:
        recording, _outgoing.recording = _outgoing.recording, None
        if recording is None:
            return None
        number = next(self._numbers)
        self._open[number] = recording
        return [number, list(recording.session.settings)]
