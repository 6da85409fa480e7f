"""One look at a worker: its calls, references, contexts, windows, connections, memory and threads.

Threads: the control thread. Nothing here waits for other workers, and locks that are taken are held for moments by
others, too. Lists are cut where they are long, and say how long they are.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from zrpc.autograd.service import AutogradService
from zrpc.rref import looks
from zrpc.rref.context import RRefContext
from zrpc.sight.names import is_of_users, waiting_functions, what_is_asked

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.agent.observed import Observed
    from zrpc.agent.request import Request
    from zrpc.ids import Incarnation

SHOWN_MAX = 500
"""So many calls, contexts and connections are shown, the oldest first."""
_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


def status(agent: Agent, began: float) -> dict[str, Any]:
    """All there is to see of a worker.

    Returns:
        msgpack values: `worker`, `members`, `calls` (of this worker to others), `requests` (of others, here), `counts`,
        `rrefs`, `contexts`, `windows`, `connections`, `memory` and `threads`.
    """
    observed = agent.observed
    names = {member.incarnation: member.info.name for member in observed.members()}
    calls, requests = observed.calls(), observed.requests()
    functions = waiting_functions()
    now = time.monotonic()
    return {
        **worker(agent, began),
        "members": members(observed),
        "ended": [[life, reason] for life, reason in islice(reversed(observed.ended().items()), 50)],
        "calls": [_call(call, now, functions) for call in calls[:SHOWN_MAX] if is_of_users(call.message)],
        "requests": [_request(observed, request, now) for request in requests[:SHOWN_MAX] if request.is_of_users],
        "counts": {**agent.counts(), "client_calls_made": observed.num_made},
        "rrefs": _rrefs(agent, names),
        "contexts": _contexts(agent, names),
        "windows": {names.get(life, life.hex()): seen for life, seen in observed.windows()[:SHOWN_MAX]},
        "connections": [list(one) for one in observed.traffic()[:SHOWN_MAX]],
        "memory": {**observed.shared_memory(), "resident_nbytes": _resident_nbytes()},
        "threads": [thread.name for thread in threading.enumerate()[:SHOWN_MAX]],
    }


def worker(agent: Agent, began: float) -> dict[str, Any]:
    """Who it is, and what it runs on."""
    info = getattr(agent, "info", None)  # there is none before it has joined
    return {
        "worker": {
            "name": None if info is None else info.name,
            "rank": -1 if info is None else info.id,
            "life": b"" if info is None else info.incarnation,
            "is_static": agent.is_static_group,
            "address": agent.address,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "began": began,
            "time": time.time(),
            "program": sys.argv[:1],
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "handler_threads": agent.options.num_worker_threads,
            "allow": agent.options.allow if isinstance(agent.options.allow, str) else list(agent.options.allow),
        }
    }


def members(observed: Observed) -> list[list[Any]]:
    """The members that a worker knows, as in `Welcome`, and whether each drains."""
    draining = observed.draining()
    return [
        [one.incarnation, one.info.name, one.info.id, one.card, one.incarnation in draining]
        for one in observed.members()
    ]


def _call(call: Call, now: float, functions: dict[int, str]) -> dict[str, Any]:
    return {
        "id": call.call_id,
        "to": call.peer.name,
        "life": call.peer.incarnation,
        "function": functions.get(call.call_id) or call.function or what_is_asked(call.message, b""),
        "age_s": now - call.began,
        "limit_s": call.timeout_s,
    }


def _request(observed: Observed, request: Request[Any], now: float) -> dict[str, Any]:
    return {
        "id": request.call_id,
        "from": request.source.name,
        "life": request.source.incarnation,
        "function": what_is_asked(request.message, request.stream),
        "age_s": now - request.began,
        "left_s": request.left_s(),
        "state": "queued" if observed.is_queued(request) else "runs",
        "is_cancelled": request.is_cancelled,
    }


def _rrefs(agent: Agent, names: dict[Incarnation, str]) -> dict[str, Any]:
    context: RRefContext | None = agent.extensions.get(RRefContext)
    if context is None:
        return {}
    seen = context.looked_at(looks.seen)
    seen["used_by_owner"] = {names.get(life, life.hex()): count for life, count in seen["used_by_owner"].items()}
    return seen


def _contexts(agent: Agent, names: dict[Incarnation, str]) -> dict[str, Any]:
    service: AutogradService | None = agent.extensions.get(AutogradService)
    found = [] if service is None else service.contexts.all()
    return {
        "count": len(found),
        "shown": [
            {
                "id": context.context_id,
                "creator": names.get(context.creator, context.creator.hex()),
                "is_in_backward": context.active is not None,
            }
            for context in found[:SHOWN_MAX]
        ],
    }


def _resident_nbytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE_NBYTES
    except OSError:
        return 0
