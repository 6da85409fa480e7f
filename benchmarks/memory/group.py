"""Worker processes that are told what to do, and groups of two."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.machine import ROOT
from benchmarks.meeting import at_broker, at_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GONE = "a worker died"


class Remote:
    """A worker process and the way to tell it something.

    Args:
        max_files: the most files it may open; None: as many as this process.
        environment: further variables.
    """

    def __init__(self, max_files: int | None = None, environment: Mapping[str, str] | None = None) -> None:
        limit = None
        if max_files is not None:
            limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (max_files, max_files))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            preexec_fn=limit,
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def tell(self, command: str, **arguments: Any) -> None:
        """Begin a command of `worker.Worker`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What the command returned.

        Raises:
            WorkerError: it raised, or the process is gone.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        told = json.loads(line) if line else {"error": GONE}
        if "error" in told:
            raise WorkerError(told["error"])
        return told["answer"]

    def ask(self, command: str, **arguments: Any) -> Any:
        """Both."""
        self.tell(command, **arguments)
        return self.answer()

    def end(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.communicate()


class WorkerError(Exception):
    """What a worker said went wrong."""


@contextlib.contextmanager
def group(
    brokered: bool, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[tuple[Remote, Remote]]:
    """Two workers: the caller `w0` and the callee `w1`."""
    with at_broker() if brokered else at_file() as method, contextlib.ExitStack() as stack:
        workers = Remote(environment=environment), Remote(environment=environment)
        for worker in workers:
            stack.callback(worker.end)
        for rank, worker in enumerate(workers):
            worker.tell("init", rank=rank, method=method, **options)
        for worker in workers:
            worker.answer()
        yield workers
        for worker in workers:
            worker.tell("shutdown")
        for worker in workers:
            worker.answer()
