"""What zrpc keeps by thread, for compiled code that goes on on a thread of TorchScript's.

Compiled code that waits is suspended, and goes on on a thread that has neither the autograd context nor the profile of
the thread where it began. TorchScript hands its own thread-local state on to such threads, and Python objects that lie
there with it. So the Python functions that compiled code calls leave a snapshot there on the thread where it begins,
and find it on others.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from zrpc.agent.current import is_agent_set
from zrpc.agent.pool import blocking
from zrpc.autograd.wiring import current_service
from zrpc.profiling import session

if TYPE_CHECKING:
    from zrpc.autograd.dist_context import DistAutogradContext
    from zrpc.profiling.session import Session

_KEY = "zrpc.thread"


class Snapshot:
    """What this thread is in the midst of. It may lie where it is for long, and keeps neither context nor profile.

    Attributes:
        waiting: to be entered while the thread, if it is a handler thread, may wait.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.waiting = blocking()
        profile = session.current()
        self._session = None if profile is None else weakref.ref(profile)
        context = current_service().contexts.find_current() if is_agent_set() else None
        self._context_id = None if context is None else context.context_id

    @property
    def session(self) -> Session | None:
        """The profile."""
        return None if self._session is None else self._session()

    @property
    def context(self) -> DistAutogradContext | None:
        """The autograd context, if it is not released."""
        return None if self._context_id is None else current_service().contexts.find(self._context_id)

    @property
    def is_of_here(self) -> bool:
        """Whether it is of this thread."""
        return self._thread == threading.get_ident()


def snapshot() -> Snapshot:
    """That of the thread where the compiled code that runs on this one began."""
    if torch._C._is_key_in_tls(_KEY):
        left: Snapshot = torch._C._get_obj_in_tls(_KEY)
        if not left.is_of_here:
            return left
    made = Snapshot()
    torch._C._stash_obj_in_tls(_KEY, made)
    return made


def may_block() -> bool:
    """Whether this thread is one where compiled code began: one of TorchScript's few threads must not be kept."""
    return snapshot().is_of_here


class Entered(ExitStack):
    """While it is entered, this thread is in the midst of what that one is in where the compiled code began."""

    def __init__(self) -> None:
        super().__init__()
        begun = snapshot()
        if begun.is_of_here or not is_agent_set():
            return
        context = begun.context
        if context is not None:
            self.enter_context(current_service().contexts.activate(context))
        self.callback(session.set_current, session.current())
        session.set_current(begun.session)
