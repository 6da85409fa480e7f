"""When a cluster starts its workers, when it is over, and with which exit code. Pure: events in, actions out.

One process at most is reported: the first that failed. Those that fail after it do so because of it, or because they
were told to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

BROKER = "broker"
FAILED = 1
SIGNAL_BASE = 128
"""Shells say 128 + n for a process that signal n ended."""


class Phase(Enum):
    STARTING = "waiting for the broker to listen"
    RUNNING = "the workers run"
    STOPPING = "everybody was told to end"
    KILLING = "everybody was killed"
    OVER = "nobody is left"


class Stop(Enum):
    """How the processes that are left are to end."""

    TERMINATE = auto()
    KILL = auto()


@dataclass(frozen=True, slots=True)
class StartWorkers:
    """Start the workers now."""


@dataclass(frozen=True, slots=True)
class RestartBroker:
    """Start the broker again, where it was, as it ended with `code`; `left`: so many times more this may happen."""

    code: int
    left: int


@dataclass(frozen=True, slots=True)
class Report:
    """Say that the process `name` ended the cluster with `code`."""

    name: str
    code: int


Action = StartWorkers | RestartBroker | Report | Stop


class Supervisor:
    """The life of one cluster.

    Args:
        workers: the workers' names.
        has_broker: whether a broker must listen before they start.
        broker_restarts: how often a broker that ends while the workers run is started again.
    """

    def __init__(self, workers: list[str], has_broker: bool, broker_restarts: int = 0) -> None:
        self._restarts_left = broker_restarts
        self._workers = workers
        self._running = {BROKER} if has_broker else set()
        self._succeeded: set[str] = set()
        self.phase = Phase.STARTING
        self.exit_code = 0

    def begin(self) -> list[Action]:
        """The processes that come first are started: what now?"""
        return [] if self._running else self._start_workers()

    def broker_listens(self) -> list[Action]:
        """The broker can be reached."""
        return self._start_workers() if self.phase is Phase.STARTING else []

    def exited(self, name: str, code: int) -> list[Action]:
        """A process ended, with the code that `subprocess` gives (below 0: by a signal)."""
        self._running.discard(name)
        actions: list[Action] = []
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            actions = self._judge(name, code)
        if not self._running and self.phase is not Phase.RUNNING:
            self.phase = Phase.OVER
        return actions

    def interrupted(self, signal_number: int) -> list[Action]:
        """The user wants an end; the second time, at once."""
        if self.phase is Phase.STOPPING:
            return self._kill()
        if self.phase in (Phase.STARTING, Phase.RUNNING):
            self.exit_code = SIGNAL_BASE + signal_number
            return self._stop()
        return []

    def failed_to_start(self) -> list[Action]:
        """A process could not even be started, or the broker does not come up."""
        self.exit_code = FAILED
        return self._stop() if self.phase in (Phase.STARTING, Phase.RUNNING) else []

    def grace_over(self) -> list[Action]:
        """Those told to end have had their time."""
        return self._kill() if self.phase is Phase.STOPPING else []

    def _start_workers(self) -> list[Action]:
        self.phase = Phase.RUNNING
        self._running.update(self._workers)
        return [StartWorkers()]

    def _judge(self, name: str, code: int) -> list[Action]:
        """A process ended though nobody had told it to."""
        if name != BROKER and code == 0:
            self._succeeded.add(name)
            return self._stop() if len(self._succeeded) == len(self._workers) else []
        if name == BROKER and self.phase is Phase.RUNNING and self._restarts_left > 0:
            self._restarts_left -= 1
            self._running.add(BROKER)
            return [RestartBroker(code, self._restarts_left)]
        self.exit_code = SIGNAL_BASE - code if code < 0 else code or FAILED
        return [Report(name, code), *self._stop()]

    def _stop(self) -> list[Action]:
        self.phase = Phase.STOPPING if self._running else Phase.OVER
        return [Stop.TERMINATE] if self._running else []

    def _kill(self) -> list[Action]:
        self.phase = Phase.KILLING
        return [Stop.KILL]
