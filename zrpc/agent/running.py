"""Running the handler of a request, and the work that it returns, on whichever thread does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc import finalizers
from zrpc.agent.request import Request
from zrpc.agent.served import serving
from zrpc.exception_text import log_error

if TYPE_CHECKING:
    from types import FrameType

    from zrpc.transport.inbox import Work

log = logging.getLogger("zrpc")

Handler = Callable[[Request[Any]], "Work | None"]


def served_in(frame: FrameType) -> Request[Any] | None:
    """The request that a thread serves in `frame`; None: it serves none there."""
    return frame.f_locals.get("request") if frame.f_code is run_all.__code__ else None


def run(handler: Handler, request: Request[Any]) -> Work | None:
    """Run a handler; what it raises is the answer, unless it has answered."""
    try:
        return handler(request)
    except BaseException as error:
        if request.answered:
            what = type(request.message).__name__
            finalizers.defer(partial(log_error, log, "the handler of %s failed after its answer", what, error=error))
        else:
            request.fail(error)
    return None


def run_all(handler: Handler, request: Request[Any]) -> None:
    """Run a handler, and the work that it returns."""
    serving.set(request)
    try:
        work = run(handler, request)
        if work is not None:
            work()
    finally:
        serving.set(None)
