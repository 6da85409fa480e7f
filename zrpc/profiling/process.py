"""Profiling everything that this worker serves, whoever asked for it."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from zrpc.agent import execution
from zrpc.profiling.session import Session, profiling_into

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.profiling.events import Event
    from zrpc.profiling.legacy import Settings

_lock = threading.Lock()
_under_way: dict[int, _ProcessProfile] = {}


class _ProcessProfile:
    """One such profile: a list of events for every request."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.requests: list[list[Event]] = []


def start(settings: Settings) -> int:
    """Record from now on what requests do that begin from now on; several profiles may be under way.

    Returns:
        What `stop` wants to be given.
    """
    profile = _ProcessProfile(settings)
    with _lock:
        _under_way[id(profile)] = profile
        execution.observe(_observe)
    return id(profile)


def stop(token: int) -> list[list[Event]]:
    """End a profile: the events of each request that was over by now."""
    with _lock:
        profile = _under_way.pop(token)
        if not _under_way:
            execution.observe(None)
        return profile.requests


@contextmanager
def _observe() -> Iterator[None]:
    """Around each function that this worker runs for somebody."""
    with _lock:
        profiles = dict(_under_way)
    sessions = {token: Session(profile.settings) for token, profile in profiles.items()}
    with ExitStack() as stack:
        for session in sessions.values():
            stack.enter_context(profiling_into(session))
        yield
    with _lock:
        for token, session in sessions.items():
            if token in _under_way:
                _under_way[token].requests.append(session.operations)
