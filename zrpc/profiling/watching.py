"""Tying sessions to the profiles of users.

torch keeps a profile's records in C++, where Python can add nothing. So a session is opened where a profile starts on a
thread, and what it gathered is added where torch reads the records: for the legacy profiler on the same thread, for
torch.profiler whenever the user asks.

Under torch.profiler, torch itself does not record RPC, and its names for calls are not used either: programs that
filter events by those names see what they saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd import profiler, profiler_legacy

from zrpc.agent.current import current_agent, is_agent_set
from zrpc.profiling import legacy, session
from zrpc.profiling.events import to_torch
from zrpc.profiling.legacy import Settings
from zrpc.profiling.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.autograd.profiler_util import FunctionEvent

_legacy_profile: Any = profiler_legacy.profile
_profile: Any = profiler.profile
_start_legacy = _legacy_profile._start_trace
_start = _profile._start_trace
_exit = _profile.__exit__
_parse = _profile._parse_kineto_results

_SESSION = "_zrpc_session"


def watch_profiles() -> None:
    """From now on see the profiles that start in this process."""
    _legacy_profile._start_trace = _start_legacy_and_session
    profiler_legacy._parse_legacy_records = _parse_legacy_with_calls
    _profile._start_trace = _start_and_session
    _profile.__exit__ = _exit_and_session
    _profile._parse_kineto_results = _parse_with_calls


# ---- the legacy profiler -----------------------------------------------------------------------------------------


def _start_legacy_and_session(self: Any) -> None:
    _start_legacy(self)
    session.set_current(Session(Settings.of(self), is_legacy=True))


def _parse_legacy_with_calls(records: Sequence[Sequence[Any]]) -> list[FunctionEvent]:
    """What torch's function gives, and the calls that this thread's session recorded, in the order they began."""
    functions = legacy.parse(records)
    if is_agent_set():
        for event in functions:
            event.node_id = current_agent().info.id
    here = session.current()
    if here is not None:
        session.set_current(None)
        base_us, thread = legacy.start_of(records)
        _add_calls(functions, here, base_us, thread)
    return functions


# ---- torch.profiler ----------------------------------------------------------------------------------------------


def _start_and_session(self: Any) -> None:
    _start(self)
    opened = Session(Settings.of(self), is_legacy=False)
    setattr(self, _SESSION, opened)
    session.set_current(opened)


def _exit_and_session(self: Any, *args: Any) -> Any:
    if session.current() is getattr(self, _SESSION, self):
        session.set_current(None)
    return _exit(self, *args)


def _parse_with_calls(self: Any, result: Any, *args: Any, **kwargs: Any) -> list[FunctionEvent]:
    functions: list[FunctionEvent] = _parse(self, result, *args, **kwargs)
    gathered: Session | None = getattr(self, _SESSION, None)
    if gathered is not None and gathered.recordings:
        thread = next((event.thread for event in functions), 0)
        _add_calls(functions, gathered, result.trace_start_ns() / 1000, thread)
    return functions


def _add_calls(functions: list[FunctionEvent], gathered: Session, base_us: float, thread: int) -> None:
    calls = [event for recording in gathered.recordings for event in recording.events(thread)]
    functions += [to_torch(event, base_us) for event in calls if event.start_us >= base_us]
    functions.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
