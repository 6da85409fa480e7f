"""Profiles that see through calls.

While torch's legacy profiler runs on a thread, each call made there is recorded under a name such as
`rpc_sync#aten::add(worker0 -> worker1)`. The request tells the callee to record what it does for it, nested calls
included, and the answer brings that back: events with the callee's rank as `node_id`, `is_remote`, and a name that
begins with the call's. All of it is in `function_events` of the profile when it is over.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from torch.autograd import profiler_legacy

from zrpc.agent.current import current_agent, is_agent_set
from zrpc.profiling import legacy, session
from zrpc.profiling.events import to_torch
from zrpc.profiling.hook import ProfilingHook, sending
from zrpc.profiling.legacy import Settings, is_profiling
from zrpc.profiling.session import Recording, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.autograd.profiler_util import FunctionEvent

    from zrpc.agent.agent import Agent
    from zrpc.ids import WorkerInfo

__all__ = ["ExecMode", "Recording", "install", "is_profiling", "profiling_key", "record", "sending"]


class ExecMode(Enum):
    """How a call was made; the value is part of its name in profiles."""

    SYNC = "sync"
    ASYNC = "async"
    ASYNC_JIT = "async_jit"
    REMOTE = "remote"


def profiling_key(mode: ExecMode, function: str, caller: str, callee: str) -> str:
    """What a call is called in profiles."""
    return f"rpc_{mode.value}#{function}({caller} -> {callee})"


def install(agent: Agent) -> None:
    """Let profiles of this process see the calls of `agent`."""
    agent.add_hook(ProfilingHook(agent))
    _watch_profiles()


def record(agent: Agent, mode: ExecMode, function: str, to: WorkerInfo) -> Recording:
    """A call is about to be made on this thread, whose profiler runs."""
    here = session.current()
    if here is None:  # the profile began before this worker did
        here = Session(Settings())
        session.set_current(here)
    key = profiling_key(mode, function, agent.info.name, to.name)
    return here.record(key, agent.info.id, mode is not ExecMode.SYNC)


def _watch_profiles() -> None:
    """Tie a session to each legacy profile of a user, once for all.

    torch keeps a profile's records in C++, where Python can add nothing. So what sessions gathered is added where they
    are read.
    """
    profile: Any = profiler_legacy.profile
    if getattr(profile._start_trace, "_watched_by", None) is _watch_profiles:
        return
    start: Callable[[Any], None] = profile._start_trace

    def start_trace(self: Any) -> None:
        start(self)
        session.set_current(Session(Settings.of(self)))

    start_trace._watched_by = _watch_profiles  # type: ignore[attr-defined]  # tells this function apart
    profile._start_trace = start_trace
    profiler_legacy._parse_legacy_records = _parse_with_calls


def _parse_with_calls(records: Sequence[Sequence[Any]]) -> list[FunctionEvent]:
    """What torch's own function gives and the calls that this thread's session recorded, in the order they began."""
    functions = legacy.parse(records)
    if is_agent_set():
        for event in functions:
            event.node_id = current_agent().info.id
    here = session.current()
    if here is not None:
        session.set_current(None)
        base_us, thread = legacy.start_of(records)
        calls = [event for recording in here.recordings for event in recording.events(thread)]
        functions += [to_torch(event, base_us) for event in calls if event.start_us >= base_us]
        functions.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    return functions
