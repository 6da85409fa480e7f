"""What each thread of a worker is at: its Python stack, and the call that it serves or waits for.

What: `sys._current_frames` gives the stacks of all threads without stopping any. Threads of other languages have none,
and of a function in C it is seen which Python function called it.
Tasks of the event loop that wait are no threads: `status` lists their calls.

Threads: the control thread.
"""

from __future__ import annotations

import linecache
import sys
import threading
from typing import TYPE_CHECKING, Any

from zrpc.agent.call import awaited_in
from zrpc.agent.running import served_in
from zrpc.sight.names import called_in, frames_from, what_is_asked

if TYPE_CHECKING:
    from types import FrameType

    from zrpc.agent.request import Request

THREADS_MAX = 512
FRAMES_MAX = 60
"""So many frames of a thread are shown, the innermost ones."""


def stacks() -> list[dict[str, Any]]:
    """Of each thread: `name`, `id`, `frames` (outermost first, `[file, line, function, text]`), `serves`, `waits_for`.

    The last two say which call it serves, and which one it waits for; None: none.
    """
    threads = {thread.ident: thread for thread in threading.enumerate()}
    found = []
    for ident, top in list(sys._current_frames().items())[:THREADS_MAX]:
        thread = threads.get(ident)
        frames = list(frames_from(top))
        found.append(
            {
                "name": f"thread {ident}" if thread is None else thread.name,
                "id": 0 if thread is None else thread.native_id,
                "is_daemon": thread is not None and thread.daemon,
                "frames": [_describe(frame) for frame in reversed(frames[:FRAMES_MAX])],
                "serves": _serves(frames),
                "waits_for": _waits_for(frames),
            }
        )
    return found


def _describe(frame: FrameType) -> list[Any]:
    code = frame.f_code
    line = frame.f_lineno or 0
    return [code.co_filename, line, code.co_qualname, linecache.getline(code.co_filename, line).strip()[:200]]


def _serves(frames: list[FrameType]) -> dict[str, Any] | None:
    for frame in frames:
        request: Request[Any] | None = served_in(frame)
        if request is not None:
            function = what_is_asked(request.message, request.stream)
            return {"id": request.call_id, "from": request.source.name, "function": function}
    return None


def _waits_for(frames: list[FrameType]) -> dict[str, Any] | None:
    call = None
    for frame in frames:
        if call is None:
            call = awaited_in(frame)
        elif (name := called_in(frame)) is not None:
            return {"id": call.call_id, "to": call.peer.name, "function": name}
    if call is None:
        return None
    return {"id": call.call_id, "to": call.peer.name, "function": what_is_asked(call.message, b"")}
