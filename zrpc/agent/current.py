"""The agent of this process: at most one, and none in a forked child, which cannot use its parent's sockets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from zrpc.errors import AlreadyInitializedError, NotInitializedError

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent

_agent: Agent | None = None
_pid = 0


def set_agent(agent: Agent | None) -> None:
    """Make `agent` this process's; None: it has none any more.

    Raises:
        AlreadyInitializedError: it has one already.
    """
    global _agent, _pid
    if agent is not None and is_agent_set():
        raise AlreadyInitializedError("RPC is already initialized: call shutdown() before init_rpc() again")
    _agent, _pid = agent, os.getpid()


def is_agent_set() -> bool:
    """Whether this process is a worker."""
    return _agent is not None and _pid == os.getpid()


def current_agent() -> Agent:
    """The agent of this process.

    Raises:
        NotInitializedError: `init_rpc` was not called, or `shutdown` was since.
    """
    agent = _agent
    if agent is None or _pid != os.getpid():
        raise NotInitializedError(
            "RPC has not been initialized. Call init_rpc first. (Current RPC agent is not set! Did you initialize the "
            "RPC framework by calling `rpc.init_rpc`?)"
        )
    return agent
