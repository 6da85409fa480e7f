"""The order of work between streams of different threads.

Each task of a worker (a request that it serves, an answer that is opened for a future) runs on streams of its own. What
is done in one and seen in another is put in order here:

- A value that one thread makes and others get (of an RRef, of a future) has a `Mark`, made where the value was made;
  who gets it joins the mark.
- A task that begins when another is over runs after what that one gave to its streams, as programs expect that change
  tensors in place (an optimizer's step, then a forward pass). Tasks that run at the same time are not ordered.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

from zrpc.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.staging.accelerator import Accelerator, Event, Stream


log = logging.getLogger("zrpc")


class Mark:
    """A place in the order of the streams that were current for one thread.

    To make one never fails: it is made where a value is handed on, and whoever waits for that must not wait for ever.
    """

    __slots__ = ("_accelerator", "_error", "_events")

    def __init__(self, accelerator: Accelerator, devices: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._events: list[tuple[str, Event]] = []
        self._error: RuntimeError | None = None
        try:
            for device in devices:
                self._events.append((device, accelerator.record(accelerator.current_stream(device))))
        except RuntimeError as error:
            self._error = error

    def join(self) -> None:
        """What this thread gives to its current streams from now on runs after the mark.

        Raises:
            DeviceError: a device has failed, now or when the mark was made.
        """
        try:
            if self._error is not None:
                raise self._error
            for device, event in self._events:
                self._accelerator.wait(self._accelerator.current_stream(device), event)
        except RuntimeError as error:
            raise DeviceError(f"a value on a device of this worker cannot be used: {error}") from error


class _Lane(NamedTuple):
    """A task's stream on one device, and what it runs after."""

    device: str
    stream: Stream
    before: list[Event]


class Streams:
    """The streams of one worker's tasks, and which are over. The lock owns the events.

    Args:
        accelerator: whose they are.
        devices: those that the worker uses.
    """

    def __init__(self, accelerator: Accelerator, devices: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._devices = tuple(devices)
        self._lock = threading.Lock()
        self._over: dict[str, list[Event]] = {device: [] for device in devices}

    def mark(self) -> Mark:
        """A mark in the streams that are current now."""
        return Mark(self._accelerator, self._devices)

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` on streams of its own.

        Where a device takes no work, the task is run all the same: it finds out itself, if it needs the device.
        """
        try:
            lanes = [self._begin(device) for device in self._devices]
        except RuntimeError as error:
            log.error("a device of this worker takes no work: %s", error)
            task()
            return
        with self._accelerator.running_on([lane.stream for lane in lanes]):
            task()
        try:
            for lane in lanes:
                self._end(lane)
        except RuntimeError as error:
            log.error("a device of this worker takes no work: %s", error)

    def _begin(self, device: str) -> _Lane:
        stream = self._accelerator.new_stream(device)
        with self._lock:
            before = self._over[device] = [event for event in self._over[device] if not event.query()]
        for event in before:
            self._accelerator.wait(stream, event)
        return _Lane(device, stream, before)

    def _end(self, lane: _Lane) -> None:
        """Its event covers those that it has waited for, so there are never more than tasks that run at once."""
        event = self._accelerator.record(lane.stream)
        with self._lock:
            left = [one for one in self._over[lane.device] if one not in lane.before]
            self._over[lane.device] = [*left, event]
