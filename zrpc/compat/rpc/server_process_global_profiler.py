"""torch.distributed.rpc.server_process_global_profiler: a profile of all that this worker serves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch.autograd import profiler_legacy, profiler_util

from zrpc.compat.missing import explaining
from zrpc.profiling import process
from zrpc.profiling.events import Event, to_torch
from zrpc.profiling.legacy import Settings

if TYPE_CHECKING:
    from types import TracebackType

    from torch.autograd.profiler_util import FunctionEvent

__all__: list[str] = []
__getattr__ = explaining("torch.distributed.rpc.server_process_global_profiler")


class _server_process_global_profile(profiler_legacy.profile):  # torch's name
    """A `torch.autograd.profiler_legacy.profile` of the functions that others call here while it is entered.

    It sees the operations of every function that begins after `__enter__` and ends before `__exit__`, on whatever
    thread. Make one on the worker to be profiled with `rpc.remote`, and enter and exit it through the RRef's proxy.

    Attributes:
        function_events: all operations.
        process_global_function_events: the same, a list for every function called.
    """

    process_global_function_events: list[list[FunctionEvent]]

    def __enter__(self) -> Any:
        if not self.enabled:
            return None
        if self.entered:
            raise RuntimeError("the profile is entered already: use another one")
        self.entered = True
        self._base_us = time.time_ns() / 1000
        self._token = process.start(Settings.of(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool | None:
        if not self.enabled:
            return None
        self.process_global_function_events = [self._in_order(events) for events in process.stop(self._token)]
        events_of: Any = profiler_util.EventList
        self.function_events = events_of(
            [event for events in self.process_global_function_events for event in events],
            use_device="cuda" if self.use_cuda else None,
            profile_memory=self.profile_memory,
        )
        self.function_events._build_tree()
        return False

    def _in_order(self, events: list[Event]) -> list[FunctionEvent]:
        made = [to_torch(event, self._base_us) for event in events]
        return sorted(made, key=lambda event: (event.time_range.start, -event.time_range.end))
