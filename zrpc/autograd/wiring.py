"""How distributed autograd gets into an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.agent.current import current_agent, is_agent_set
from zrpc.autograd.ddp import watch_models
from zrpc.autograd.hook import AutogradHook
from zrpc.autograd.service import AutogradService
from zrpc.wire.messages import AbortBackward, BackwardRequest, JoinContexts, MarkSends, ReleaseContexts

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent
    from zrpc.autograd.dist_context import DistAutogradContext


def install(agent: Agent) -> None:
    """Make `agent` take part in distributed autograd. To be called after RRefs are installed, and before it joins."""
    service = agent.extensions[AutogradService] = AutogradService(agent)
    agent.add_hook(AutogradHook(service.contexts, lambda: agent.ids.next(), lambda: agent.options.propagate_grad_mode))
    agent.handle(BackwardRequest, service.on_backward, inline=True)
    agent.handle(MarkSends, service.on_mark, inline=False)
    agent.handle(ReleaseContexts, service.on_release, inline=True)
    agent.handle(JoinContexts, service.on_join, inline=True)
    agent.handle(AbortBackward, service.on_abort, inline=True)
    agent.on_peer_lost(service.on_peer_lost)
    watch_models(_current_context)


def current_service() -> AutogradService:
    """Distributed autograd of this process's worker.

    Raises:
        NotInitializedError: this process is no worker.
    """
    service: AutogradService = current_agent().extensions[AutogradService]
    return service


def _current_context() -> DistAutogradContext | None:
    return current_service().contexts.find_current() if is_agent_set() else None
