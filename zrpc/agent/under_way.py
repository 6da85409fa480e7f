"""What is under way in a worker, in words: what a shutdown or a drain waits for, or ended without.

The oldest are named, `MAX_NAMED` at most, each with its function, the other worker and its age.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zrpc.agent.call import Call
    from zrpc.agent.request import Request

MAX_NAMED = 5


def describe(calls: Iterable[Call], requests: Iterable[Request[Any]]) -> str:
    """The calls that others are to answer, and those that are served here."""
    return f"{_describe_calls(calls)}, and {_describe_requests(requests)}"


def _describe_calls(calls: Iterable[Call]) -> str:
    oldest = sorted(calls, key=lambda call: call.began)
    named = [
        f"{_what(call.message, call.function)} to {call.peer.name}, {_age(call.began)}" for call in oldest[:MAX_NAMED]
    ]
    return _counted(len(oldest), "that others are to answer", named)


def _describe_requests(requests: Iterable[Request[Any]]) -> str:
    oldest = sorted(requests, key=lambda request: request.began)
    named = [
        f"{_what(request.message, request.function)} for {request.source.name}, {_age(request.began)}"
        for request in oldest[:MAX_NAMED]
    ]
    return _counted(len(oldest), "that run here", named)


def _counted(count: int, which: str, named: Sequence[str]) -> str:
    calls = f"{count or 'no'} calls {which}"
    more = f"; and {count - len(named)} more" if count > len(named) else ""
    return f"{calls} ({'; '.join(named)}{more})" if named else calls


def _what(message: object, function: str | None) -> str:
    kind = type(message).__name__
    name = getattr(message, "op", function)
    return f"{kind} of {name}" if name else kind


def _age(began: float) -> str:
    return f"for {time.monotonic() - began:.1f} s"
