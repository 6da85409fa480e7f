"""One measurement: a group of forked workers, taken through its life. `python -m benchmarks.scaling.group MODE N`.

It runs in a process of its own, which imports torch once and then forks: a hundred times `import torch` would measure
the disk. Nothing is started before the fork, no thread and no socket.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.scaling.modes import MODES, Mode
from benchmarks.scaling.point import Point
from benchmarks.scaling.worker import Done, Failed, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

CALLS_ALL_TO_ALL = 20_000
"""About as many calls are made in an all-to-all, whatever the size of the group."""


class PhaseFailedError(Exception):
    """A worker failed, died, or was not done in time."""


class Group:
    """Forked workers and a pipe to each. A context manager: it leaves no process behind."""

    def __init__(self, mode: Mode, init_method: str, n: int, limit_s: float) -> None:
        self._limit_s = limit_s
        self._pipes: list[Connection] = []
        self._processes: list[ForkProcess] = []
        context = multiprocessing.get_context("fork")
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(mode, init_method, rank, n, theirs, [*self._pipes, ours]))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Group:
        self._collect("start", range(len(self._pipes)))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def run(self, phase: str, *args: Any, ranks: Iterable[int] | None = None) -> tuple[float, list[Any]]:
        """Take workers (all, or `ranks`) through a phase.

        Returns:
            Seconds from the word to begin until the last of them was done, and what came of it for each.

        Raises:
            PhaseFailedError: it failed in one of them.
        """
        chosen = range(len(self._pipes)) if ranks is None else ranks
        began = time.monotonic()
        for rank in chosen:
            self._pipes[rank].send((phase, args))
        done = self._collect(phase, chosen)
        return max(one.at for one in done) - began, [one.value for one in done]

    def end(self) -> None:
        """Let every worker return, and see that it exits.

        Raises:
            PhaseFailedError: one does not, or exits badly.
        """
        deadline = time.monotonic() + self._limit_s
        for pipe in self._pipes:
            pipe.send(None)
        for rank, process in enumerate(self._processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode != 0:
                raise PhaseFailedError(f"exit: worker {rank} ended with {process.exitcode}")

    def _collect(self, phase: str, ranks: Iterable[int]) -> list[Done]:
        deadline = time.monotonic() + self._limit_s
        waiting = {self._pipes[rank]: rank for rank in ranks}
        done: list[Done] = []
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PhaseFailedError(f"{phase}: {len(waiting)} workers were not done within {self._limit_s:g} s")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]  # only pipes were waited for
                done.append(self._answer(phase, rank))
        return done

    def _answer(self, phase: str, rank: int) -> Done:
        try:
            answer = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(1.0)
            code = self._processes[rank].exitcode
            raise PhaseFailedError(f"{phase}: worker {rank} died with exit code {code}") from None
        if isinstance(answer, Failed):
            print(answer.text, file=sys.stderr)
            raise PhaseFailedError(f"{phase}: worker {rank}: {answer.text.strip().splitlines()[-1]}")
        assert isinstance(answer, Done)
        return answer


def _serve(mode: Mode, init_method: str, rank: int, n: int, pipe: Connection, not_ours: list[Connection]) -> None:
    for other in not_ours:
        other.close()
    Worker(mode, init_method, rank, n, pipe).serve()


def measure(mode_key: str, n: int, limit_s: float) -> Point:
    """The life of one group; each phase may take `limit_s` seconds."""
    mode, point = MODES[mode_key], Point(mode_key, n)
    mode.load()
    torch.set_num_threads(1)
    with mode.meeting() as init_method, Group(mode, init_method, n, limit_s) as group:
        try:
            point.init_s, _ = group.run("init")
            first_s, _ = group.run("fan_out", ranks=[0])
            point.first_fan_out_ms = first_s * 1e3
            _, [fan_outs] = group.run("fan_outs", ranks=[0])
            point.fan_out_ms = statistics.median(fan_outs) * 1e3
            point.fan_out_calls_per_s = n * len(fan_outs) / sum(fan_outs)
            point.first_all_to_all_s, _ = group.run("fan_out")
            rounds = max(1, CALLS_ALL_TO_ALL // (n * n))
            all_to_all_s, _ = group.run("all_to_all", rounds)
            point.all_to_all_calls_per_s = rounds * n * n / all_to_all_s
            _, fds = group.run("count_fds")
            point.fds_max = max(fds)
            point.shutdown_s, _ = group.run("shutdown")
            group.end()
        except PhaseFailedError as error:
            point.error = str(error)
    return point


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
