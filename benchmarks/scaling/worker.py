"""One worker of a group that is measured: it does what its driver says, phase by phase, and says when it was done."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.scaling.modes import worker_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from benchmarks.scaling.modes import Mode

FAN_OUTS_S = 1.0
"""How long fan-outs are repeated, once the connections are there."""
FAN_OUTS_MIN = 3


def _count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@dataclass(frozen=True)
class Done:
    """A phase is over: when (`time.monotonic`, one clock for all processes of a host), and what came of it."""

    at: float
    value: Any = None


@dataclass(frozen=True)
class Failed:
    """The worker cannot go on."""

    text: str


def noop() -> None:
    """What every call here runs."""


class Worker:
    """Runs in a forked process; `serve` returns when the driver has gone or has sent None."""

    def __init__(self, mode: Mode, init_method: str, rank: int, world_size: int, pipe: Connection) -> None:
        self._mode = mode
        self._init_method = init_method
        self._rank = rank
        self._names = [worker_name(rank) for rank in range(world_size)]
        self._pipe = pipe

    def serve(self) -> None:
        """Do what the driver asks for; the first failure ends it."""
        self._rpc = self._mode.load()
        before = _count_fds()
        phases: dict[str, Callable[..., Any]] = {
            "init": lambda: self._mode.init(self._init_method, self._rank, len(self._names)),
            "fan_out": self.fan_out,
            "fan_outs": self.fan_outs,
            "all_to_all": self.all_to_all,
            "count_fds": lambda: _count_fds() - before,
            "shutdown": lambda: self._rpc.shutdown(),
        }
        self._pipe.send(Done(time.monotonic()))
        while (asked := self._pipe.recv()) is not None:
            phase, args = asked
            try:
                value = phases[phase](*args)
            except BaseException:
                self._pipe.send(Failed(traceback.format_exc()))
                return
            self._pipe.send(Done(time.monotonic(), value))

    def fan_out(self) -> None:
        """Call every worker at once, this one too, and wait for all."""
        for future in [self._rpc.rpc_async(name, noop) for name in self._names]:
            future.wait()

    def fan_outs(self) -> list[float]:
        """Fan out again and again; the seconds that each took."""
        taken: list[float] = []
        while len(taken) < FAN_OUTS_MIN or sum(taken) < FAN_OUTS_S:
            began = time.perf_counter()
            self.fan_out()
            taken.append(time.perf_counter() - began)
        return taken

    def all_to_all(self, rounds: int) -> None:
        """This worker's part of `rounds` exchanges in which everybody calls everybody."""
        for _ in range(rounds):
            self.fan_out()
