"""Profiles that see through calls.

While a profile of torch's legacy profiler runs on a thread, each call made there is recorded under a name such as
`rpc_sync#aten::add(worker0 -> worker1)`. The request tells the callee to record what it does for it, nested calls
included, and the answer brings that back: events with the callee's rank as `node_id`, `is_remote`, and a name that
begins with the call's. All of it is in `function_events` of the profile when it is over. With torch.profiler it is the
same, in `events()` and what is made of them, and the name is `rpc#aten::add(worker0 -> worker1)`.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from zrpc.profiling import legacy, session
from zrpc.profiling.hook import ProfilingHook, sending
from zrpc.profiling.legacy import Settings
from zrpc.profiling.session import Recording, Session
from zrpc.profiling.watching import watch_profiles

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent
    from zrpc.ids import WorkerInfo

__all__ = ["ExecMode", "Recording", "install", "is_profiling", "profiling_key", "record", "sending"]


class ExecMode(Enum):
    """How a call was made; the value is part of its name in profiles."""

    SYNC = "sync"
    ASYNC = "async"
    ASYNC_JIT = "async_jit"  # from compiled TorchScript
    REMOTE = "remote"


def profiling_key(mode: ExecMode, function: str, caller: str, callee: str) -> str:
    """What a call is called in profiles."""
    return f"rpc_{mode.value}#{function}({caller} -> {callee})"


def install(agent: Agent) -> None:
    """Let profiles of this process see the calls of `agent`."""
    agent.add_hook(ProfilingHook(agent))
    watch_profiles()


def is_profiling() -> bool:
    """Whether calls made on this thread are to be recorded."""
    if not legacy.is_enabled():
        return False
    return session.current() is not None or legacy.is_legacy()


def record(agent: Agent, mode: ExecMode, function: str, to: WorkerInfo) -> Recording:
    """A call is about to be made on this thread, which profiles."""
    here = session.current()
    if here is None:  # the profile began before this worker did
        here = Session(Settings(), is_legacy=True)
        session.set_current(here)
    if here.is_legacy:
        key = profiling_key(mode, function, agent.info.name, to.name)
    else:
        key = f"rpc#{function}({agent.info.name} -> {to.name})"
    return here.record(key, agent.info.id, mode is not ExecMode.SYNC)
