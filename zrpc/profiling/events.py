"""One profiled operation, as it travels and as torch's profiler shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import profiler_util

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.autograd.profiler_util import FunctionEvent

REMOTE_MARK = "#remote_op: "
"""Stands between the name of a call and the name of an operation that it ran on the callee, as in torch."""

NO_NODE = -1
_CPU: Any = torch._C._autograd.DeviceType.CPU


class Event(NamedTuple):
    """One operation.

    Attributes:
        start_us: since the epoch, by the clock of the host that it ran on.
        end_us: likewise.
        node_id: rank of the worker that it ran on.
        thread: torch's number of the thread.
        shapes: of its tensor arguments, if they were recorded.
        is_async: it did not end on the thread that it began on.
        is_remote: it ran on another worker than the one that profiles.
    """

    name: str
    start_us: float
    end_us: float
    node_id: int = NO_NODE
    thread: int = 0
    id: int = 0
    fwd_thread: int = 0
    shapes: Any = ()
    stack: Any = ()
    scope: int = 0
    cpu_memory: int = 0
    device_memory: int = 0
    sequence_nr: int = -1
    flops: int = 0
    is_async: bool = False
    is_remote: bool = False

    def called_by(self, call: str, shift_us: float) -> Event:
        """This event as the caller shows it: a part of the call named `call`."""
        return self._replace(
            name=f"{call}{REMOTE_MARK}{self.name}",
            start_us=self.start_us + shift_us,
            end_us=self.end_us + shift_us,
            is_remote=True,
        )


def from_torch(event: FunctionEvent, base_us: float) -> Event:
    """An event of torch's profiler whose times count from `base_us`."""
    return Event(
        name=event.name,
        start_us=base_us + event.time_range.start,
        end_us=base_us + event.time_range.end,
        node_id=event.node_id,
        thread=event.thread,
        id=event.id,
        fwd_thread=event.fwd_thread or 0,
        shapes=event.input_shapes or (),
        stack=event.stack or (),
        scope=event.scope,
        cpu_memory=event.cpu_memory_usage,
        device_memory=event.device_memory_usage,
        sequence_nr=event.sequence_nr,
        flops=event.flops or 0,
        is_async=event.is_async,
        is_remote=event.is_remote,
    )


def to_torch(event: Event, base_us: float) -> FunctionEvent:
    """An event for torch's profiler, with times that count from `base_us`."""
    made: Any = profiler_util.FunctionEvent
    event_of_torch: FunctionEvent = made(
        id=event.id,
        name=event.name,
        trace_name=event.name,
        thread=event.thread,
        start_us=event.start_us - base_us,
        end_us=event.end_us - base_us,
        fwd_thread=event.fwd_thread,
        input_shapes=[list(shape) for shape in event.shapes],
        stack=list(event.stack),
        scope=event.scope,
        cpu_memory_usage=event.cpu_memory,
        device_memory_usage=event.device_memory,
        is_async=event.is_async,
        is_remote=event.is_remote,
        sequence_nr=event.sequence_nr,
        node_id=event.node_id,
        device_type=_CPU,
        is_legacy=True,
        flops=event.flops,
    )
    return event_of_torch


def shift_into(events: Iterable[Event], start_us: float, end_us: float) -> float:
    """By how much another host's clock must be set for `events` to lie between `start_us` and `end_us`.

    Nothing, if they lie there already, as on one host; else they are put in the middle, as if the way there and the way
    back took equally long.
    """
    events = list(events)
    if not events:
        return 0.0
    first, last = min(event.start_us for event in events), max(event.end_us for event in events)
    if start_us <= first and last <= end_us:
        return 0.0
    return (start_us + end_us) / 2 - (first + last) / 2
