"""torch's legacy profiler on one thread: started, stopped, and its records read.

Callees record with this profiler, as in torch: it is bound to a thread, so what a callee does for one caller can be
told from what it does for others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import profiler_legacy

from zrpc.profiling.events import Event, from_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.autograd.profiler_util import FunctionEvent

_START_MARK = "__start_profile"
_LEGACY = torch._C._profiler.ActiveProfilerType.LEGACY
_autograd: Any = torch._C._autograd  # its functions are untyped
_states: Any = torch._C._profiler
_parse: Any = profiler_legacy._parse_legacy_records


class Settings(NamedTuple):
    """What is recorded, beside names and times."""

    use_cuda: bool = False
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False

    @classmethod
    def of(cls, profile: Any) -> Settings:
        """The settings of a `profile` of torch. CUDA is left to each worker's own profiles."""
        return cls(*(bool(getattr(profile, name, False)) for name in cls._fields))

    def config(self) -> Any:
        """The same for torch."""
        with_cuda = self.use_cuda and torch.cuda.is_available()
        return _states.ProfilerConfig(
            _states.ProfilerState.CUDA if with_cuda else _states.ProfilerState.CPU,
            self.record_shapes,
            self.profile_memory,
            self.with_stack,
            self.with_flops,
            self.with_modules,
            _states._ExperimentalConfig(),
        )


def is_enabled() -> bool:
    """Whether any profiler of torch runs on this thread."""
    return bool(_autograd._profiler_enabled())


def is_legacy() -> bool:
    """Whether the profiler that runs on this thread is the legacy one."""
    return bool(_autograd._profiler_type() == _LEGACY)


def start(settings: Settings) -> None:
    """Begin to record on this thread."""
    _autograd._enable_profiler_legacy(settings.config())


def stop() -> list[Event]:
    """End what `start` began: what this thread did since."""
    records = _autograd._disable_profiler_legacy()
    base_us, _ = start_of(records)
    return [from_torch(event, base_us) for event in parse(records)]


def parse(records: Sequence[Sequence[Any]]) -> list[FunctionEvent]:
    """The events that `records` are the beginnings and ends of, without those of RPC."""
    found: list[FunctionEvent] = _parse(records)
    return found


def start_of(records: Sequence[Sequence[Any]]) -> tuple[float, int]:
    """When recording began, in microseconds since the epoch, and on which thread."""
    mark = next(record for thread in records for record in thread if record.name() == _START_MARK)
    return mark.start_us(), mark.thread_id()
