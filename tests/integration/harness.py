"""Runs a test's function on real worker processes and brings back what it returned or raised.

Workers are forked from a server that has torch and zrpc loaded, so that a test with two workers takes well under a
second. Each is called `worker0`, `worker1`, ...; its function is a module-level one of the test module, is called with
the worker's rank and its result must be picklable.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Mode = Literal["file", "tcp", "broker"]
MODES: tuple[Mode, ...] = ("file", "tcp", "broker")

PORTS = range(10_000, 32_768)
"""Below those that Linux gives out."""

AFTER_FAILURE_S = 10.0
"""In `Cluster.run`: how long the others may go on once a worker has failed, to say what they saw of it."""

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    ["torch", "torch.distributed", "pytest", "psutil", "zrpc.api", "zrpc.autograd", "zrpc.optim"]
)


@dataclass
class Outcome:
    """How one worker ended: with a `result` or with an `error`, as text: its traceback, or how it died."""

    rank: int
    result: Any = None
    error: str | None = None
    exitcode: int | None = None


class WorkersFailedError(AssertionError):
    """Some workers raised, died or did not come to an end; the text has every traceback."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        failed = [f"worker{o.rank} (exit code {o.exitcode}):\n{o.error}" for o in outcomes if o.error is not None]
        super().__init__("\n".join(failed))


@dataclass
class Spec:
    """What one worker process is told."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    init_method: str
    init: bool
    options: dict[str, Any]


def _run_worker(spec: Spec, pipe: multiprocessing.connection.Connection) -> None:
    """The whole life of a worker process."""
    try:
        gc.freeze()  # torch and the tests: collecting garbage, which many tests do, takes long otherwise
        leaks.start_frame_collector()
        # torch's store, which rank 0 hosts, stays open in static groups: others may still read it.
        store_port = urlparse(spec.init_method).port if spec.init_method.startswith("tcp:") else None
        with leaks.nothing_left(store_port=store_port) if spec.init else nullcontext():
            # Plain pickle: multiprocessing's own would send tensors through shared memory that outlives this process.
            told = pickle.dumps((True, _call(spec)))
        pipe.send_bytes(told)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)  # what the failed worker still holds must not keep its process alive


def _call(spec: Spec) -> Any:
    os.environ.update(RANK=str(spec.rank), WORLD_SIZE=str(spec.world_size))
    if not spec.init:
        return spec.function(spec.rank, *spec.args)
    import zrpc as rpc

    rpc.init_rpc(
        f"worker{spec.rank}",
        rank=spec.rank,
        world_size=spec.world_size,
        rpc_backend_options=rpc.RpcBackendOptions(init_method=spec.init_method, **spec.options),
    )
    result = spec.function(spec.rank, *spec.args)
    rpc.shutdown()
    return result


@dataclass
class Running:
    """Worker processes under way."""

    processes: list[Any]
    pipes: list[multiprocessing.connection.Connection]
    outcomes: list[Outcome] = field(default_factory=list)

    def kill(self, rank: int) -> None:
        """End a worker without giving it a chance to say so, and wait until it is gone."""
        self.processes[rank].kill()
        self.processes[rank].join()

    def wait(self, timeout_s: float, after_failure_s: float | None = None) -> list[Outcome]:
        """How every worker ended; those that have not after `timeout_s` are killed.

        With `after_failure_s` the others get no more time than that once one has failed.
        """
        deadline = time.monotonic() + timeout_s
        waiting = {pipe: Outcome(rank) for rank, pipe in enumerate(self.pipes)}
        self.outcomes = list(waiting.values())
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for pipe in multiprocessing.connection.wait(list(waiting), left_s):
                outcome = waiting.pop(pipe)  # type: ignore[call-overload]  # only pipes were waited for
                if not self._read(outcome) and after_failure_s is not None:
                    deadline = min(deadline, time.monotonic() + after_failure_s)
        for outcome in waiting.values():
            outcome.error = f"did not come to an end within {timeout_s} s (or {after_failure_s} s of another's failure)"
        self._end(deadline)
        return self.outcomes

    def _read(self, outcome: Outcome) -> bool:
        try:
            ok, value = pickle.loads(self.pipes[outcome.rank].recv_bytes())
        except EOFError:
            outcome.error = "died without a word"
            return False
        if ok:
            outcome.result = value
        else:
            outcome.error = value
        return bool(ok)

    def _end(self, deadline: float) -> None:
        """Every process is gone after this; one that came to its end but does not exit is a failure too."""
        for outcome, process, pipe in zip(self.outcomes, self.processes, self.pipes, strict=True):
            unfinished = outcome.error is not None
            process.join(0 if unfinished else max(1.0, deadline - time.monotonic()))
            if process.exitcode is None:
                outcome.error = outcome.error or "its function returned and RPC was shut down, but it does not exit"
                process.kill()
                process.join()
            outcome.exitcode = process.exitcode
            if process.exitcode and outcome.error is None:
                outcome.error = "exited badly after its function had returned"
            process.close()
            pipe.close()


class Cluster:
    """Starts workers that find each other in one way (`mode`); ends what is left of them when the test is over."""

    def __init__(self, mode: Mode, directory: Path) -> None:
        self.mode = mode
        self._directory = directory
        self._running: list[Running] = []
        self._brokers: list[subprocess.Popen[bytes]] = []
        self._stores = itertools.count()

    def run(
        self,
        function: Callable[..., Any],
        n: int = 2,
        *,
        args: tuple[Any, ...] = (),
        timeout_s: float = 150.0,
        init: bool = True,
        **options: Any,
    ) -> list[Any]:
        """Call `function(rank, *args)` on `n` workers between `init_rpc` and `shutdown`; their results by rank.

        Args:
            function: a module-level function.
            n: how many workers.
            args: the function's further arguments; picklable.
            timeout_s: after this all are killed.
            init: whether the harness calls `init_rpc` and `shutdown`; if not, the function does, as it likes.
            options: further options of `RpcBackendOptions`.

        Raises:
            WorkersFailedError: a worker raised, died, left something behind or did not end in time.
        """
        outcomes = self.start(function, n, args=args, init=init, **options).wait(timeout_s, AFTER_FAILURE_S)
        if any(outcome.error is not None for outcome in outcomes):
            raise WorkersFailedError(outcomes)
        return [outcome.result for outcome in outcomes]

    def start(
        self,
        function: Callable[..., Any],
        n: int = 2,
        *,
        args: tuple[Any, ...] = (),
        init: bool = True,
        init_method: str | None = None,
        **options: Any,
    ) -> Running:
        """The same without waiting: for tests that kill a worker, or look at how each ended."""
        method = init_method or self.new_init_method()
        running = Running([], [])
        self._running.append(running)
        for rank in range(n):
            reader, writer = forkserver.Pipe(duplex=False)
            spec = Spec(function, args, rank, n, method, init, options)
            process = forkserver.Process(target=_run_worker, args=(spec, writer), name=f"worker{rank}", daemon=True)
            process.start()
            writer.close()
            running.processes.append(process)
            running.pipes.append(reader)
        return running

    def new_init_method(self, **environment: str) -> str:
        """A meeting point for one group; with a broker, one of its own is started, with `environment` besides."""
        if self.mode == "file":
            return f"file://{self._directory}/store{next(self._stores)}"
        port = free_port()
        if self.mode == "tcp":
            return f"tcp://127.0.0.1:{port}"
        command = [sys.executable, "-m", "zrpc_broker", "--bind", f"tcp://127.0.0.1:{port}"]
        self._brokers.append(subprocess.Popen(command, env={**os.environ, **environment}))
        return f"broker://127.0.0.1:{port}"

    def broker_pid(self) -> int:
        """The process of the broker that was started last."""
        return self._brokers[-1].pid

    def close(self) -> None:
        """End every process that this cluster started."""
        for running in self._running:
            for process, pipe in zip(running.processes, running.pipes, strict=True):
                if not pipe.closed:
                    process.kill()
                    process.join()
                    pipe.close()
        for broker in self._brokers:
            broker.terminate()
            try:
                broker.wait(10)
            except subprocess.TimeoutExpired:
                broker.kill()
                broker.wait()
                raise


def free_port() -> int:
    """A TCP port of the loopback interface where nothing listens now.

    Several processes run tests at once: it is none of those that the system gives to whatever asks for any port.
    """
    chance = random.SystemRandom()
    while True:
        try:
            with socket.create_server(("127.0.0.1", chance.choice(PORTS))) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue


def is_member(name: str) -> bool:
    """Whether the worker `name` is in this worker's group now. Called in workers."""
    from zrpc import api, errors

    try:
        api.get_worker_info(name)
    except errors.UnknownWorkerError:
        return False
    return True
