"""The order of work between streams of different threads.

Each request is served on streams of its own. What is done in one and seen in another is put in order here:

- A value that one thread makes and others get (of an RRef, of a future) has a `Mark`, made where the value was made;
  who gets it joins the mark.
- A request that comes when another has been served runs after what that one gave to its streams, as programs expect
  that change tensors in place (an optimizer's step, then a forward pass). Requests that are served at the same time
  are not ordered.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zrpc.staging.accelerator import Accelerator, Event, Stream


class Mark:
    """A place in the order of the streams that were current for one thread."""

    __slots__ = ("_accelerator", "_events")

    def __init__(self, accelerator: Accelerator, devices: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._events = [(device, accelerator.record(accelerator.current_stream(device))) for device in devices]

    def join(self) -> None:
        """What this thread gives to its current streams from now on runs after the mark."""
        for device, event in self._events:
            self._accelerator.wait(self._accelerator.current_stream(device), event)


class _Lane(NamedTuple):
    """A request's stream on one device, and what it runs after."""

    device: str
    stream: Stream
    before: list[Event]


class Streams:
    """The streams of one worker's requests, and what has been served. The lock owns the events.

    Args:
        accelerator: whose they are.
        devices: those that the worker uses.
    """

    def __init__(self, accelerator: Accelerator, devices: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._devices = tuple(devices)
        self._lock = threading.Lock()
        self._served: dict[str, list[Event]] = {device: [] for device in devices}

    def mark(self) -> Mark:
        """A mark in the streams that are current now."""
        return Mark(self._accelerator, self._devices)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve one request in the body, on streams of its own."""
        lanes = [self._begin(device) for device in self._devices]
        with self._accelerator.running_on([lane.stream for lane in lanes]):
            try:
                yield
            finally:
                for lane in lanes:
                    self._end(lane)

    def _begin(self, device: str) -> _Lane:
        stream = self._accelerator.new_stream(device)
        with self._lock:
            before = self._served[device] = [event for event in self._served[device] if not event.query()]
        for event in before:
            self._accelerator.wait(stream, event)
        return _Lane(device, stream, before)

    def _end(self, lane: _Lane) -> None:
        """Its event covers those that it has waited for, so there are never more than requests served at once."""
        event = self._accelerator.record(lane.stream)
        with self._lock:
            left = [served for served in self._served[lane.device] if served not in lane.before]
            self._served[lane.device] = [*left, event]
