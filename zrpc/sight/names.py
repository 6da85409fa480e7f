"""Names of functions that calls are about, for people.

Threads: the control thread, and callers while a trace is on. Frames of other threads are looked at where they stand;
only variables of functions of zrpc's own are read.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from zrpc import api
from zrpc.agent.call import awaited_in
from zrpc.wire.messages import BuiltinCall, BuiltinRemote, PythonCall, PythonRemote
from zrpc.wire.naming import function_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from zrpc.wire.envelope import Buffer
    from zrpc.wire.messages import Message

DEPTH_MAX = 200
_CALLERS = {function.__code__ for function in (api.rpc_sync, api.begin, api.broadcast)}
_CREATOR = api.remote.__code__


def what_is_asked(message: Message, stream: Buffer) -> str:
    """The function that a message is to have run; where that cannot be told, what kind of message it is."""
    op = getattr(message, "op", None)
    name = op if isinstance(op, str) else function_in(stream)
    return name or type(message).__name__


def is_of_users(message: Message) -> bool:
    """Whether a message has a function run, and is no part of zrpc's own protocols."""
    return isinstance(message, PythonCall | BuiltinCall | PythonRemote | BuiltinRemote)


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """`frame` and those that called it, up to `DEPTH_MAX`."""
    for _ in range(DEPTH_MAX):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def waiting_functions() -> dict[int, str]:
    """The functions of calls that threads of this process wait for, by the numbers of the calls."""
    found = {}
    for top in list(sys._current_frames().values()):
        call = None
        for frame in frames_from(top):
            if call is None:
                call = awaited_in(frame)
            elif (name := called_in(frame)) is not None:
                found[call.call_id] = name
                break
    return found


def called_here() -> str | None:
    """The function that this thread is just calling on another worker."""
    return next((name for frame in frames_from(sys._getframe(1)) if (name := called_in(frame)) is not None), None)


def called_in(frame: FrameType) -> str | None:
    """The function that `frame`, if it is one of `zrpc.api`, calls on another worker."""
    if frame.f_code not in _CALLERS and frame.f_code is not _CREATOR:
        return None
    variables = frame.f_locals
    func: Callable[..., Any] | None = variables.get("func")
    if func is None:
        return None
    if (op := api.operator_name(func)) is not None:
        return op
    name = getattr(func, "__qualname__", type(func).__qualname__)
    if str(name).startswith("_local_invoke"):
        args: Sequence[Any] = variables.get("args") or ()
        return f"RRef.{args[1]}" if len(args) > 1 and isinstance(args[1], str) else str(name)
    module = getattr(func, "__module__", None)
    return f"{module}.{name}" if module else str(name)
