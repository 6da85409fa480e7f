"""The launcher: starts a cluster's processes, follows them, and leaves none behind.

What happens when is the supervisor's decision (`zrpc.cli.supervisor`), what is started the plan's (`zrpc.cli.plan`);
here is what carries both out. The main thread alone handles events, which the processes' threads and signal handlers
queue.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from zrpc.cli.output import Screen
from zrpc.cli.plan import (
    SECRET_QUESTION,
    Launch,
    Place,
    Reach,
    check_script,
    local_environment,
    meet_at_broker,
    meet_at_master,
    parse_hosts,
    place,
    remote_command,
    secret_environment,
    worker_environment,
)
from zrpc.cli.process import ManagedProcess
from zrpc.cli.supervisor import BROKER, Action, Phase, Report, RestartBroker, StartWorkers, Stop, Supervisor
from zrpc.errors import ConfigError, LimitError
from zrpc_broker.defaults import READY_PREFIX

if TYPE_CHECKING:
    from types import FrameType

LOCALHOST = "127.0.0.1"
BROKER_START_S = 30.0
REMOTE_MASTER_PORT = 29_500
"""On another host a free port cannot be found from here."""
SSH_FAILED = 255

Event = Callable[[Supervisor], list[Action]]


def launch(options: Launch) -> int:
    """Run a cluster to its end; the exit code. Call it on the main thread.

    Raises:
        ConfigError: it cannot be started as asked; nothing was started.
    """
    return Cluster(options).run()


class Cluster:
    """One run of the launcher. Everything but `_put` is called on the main thread.

    Raises:
        ConfigError: the options cannot be used.
    """

    def __init__(self, options: Launch) -> None:
        self._options = options
        self._reach = choose_reach(options)
        check_script(options.program, self._reach)
        self._hosts = [LOCALHOST] if self._reach is Reach.LOCAL else parse_hosts(options.hosts or "")
        self._places = {_name(spot): spot for spot in place(options.workers, self._hosts)}
        self._meeting: dict[str, str] = {}
        self._secret = secret_environment(os.environ)
        self._supervisor = Supervisor(list(self._places), options.broker, options.broker_restarts)
        self._bind = options.bind or f"tcp://{LOCALHOST if self._reach is Reach.LOCAL else '0.0.0.0'}:0"
        self._screen = Screen(sys.stdout, max(map(len, self._places)))
        self._processes: dict[str, ManagedProcess] = {}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._timer: threading.Timer | None = None

    def run(self) -> int:
        """Start everything and follow it until nobody is left."""
        with self._signals_queued():
            try:
                self._begin()
                while self._supervisor.phase is not Phase.OVER:
                    self._carry_out(self._events.get()(self._supervisor))
            finally:
                self._set_deadline(None)
                for process in self._processes.values():
                    process.kill()
        self._screen.end_line()
        return self._supervisor.exit_code

    # ---- events -----------------------------------------------------------------------------------------------------

    def _put(self, event: Event) -> None:
        """Queue an event. Any thread, or a signal handler: a SimpleQueue may be put to while a put is under way."""
        self._events.put(event)

    def _set_deadline(self, after_s: float | None) -> None:
        """Nothing may take longer from now on; None: there is no hurry.

        A timer puts an event: a SimpleQueue of Python 3.11 that is asked to wait for so long may wait for ever.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
        if after_s is not None:
            timer = threading.Timer(after_s, lambda: self._put(partial(self._on_deadline, timer)))
            self._timer = timer
            timer.start()

    def _on_deadline(self, timer: threading.Timer, supervisor: Supervisor) -> list[Action]:
        if timer is not self._timer:  # it was cancelled a moment too late
            return []
        if supervisor.phase is Phase.STARTING:
            _say(f"the broker does not listen after {BROKER_START_S:g} s")
            return supervisor.failed_to_start()
        return supervisor.grace_over()

    def _interrupted(self, number: int, supervisor: Supervisor) -> list[Action]:
        if supervisor.phase in (Phase.STARTING, Phase.RUNNING):
            self._screen.end_line()
            _say(f"{signal.Signals(number).name}: the cluster is told to end; once more kills it")
        return supervisor.interrupted(number)

    def _on_exit(self, process: ManagedProcess, code: int) -> None:
        self._put(lambda supervisor: supervisor.exited(process.name, code))

    @contextmanager
    def _signals_queued(self) -> Iterator[None]:
        """Signals that would end the launcher become events."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._put(partial(self._interrupted, number))

        wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.signal(number, handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- actions ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._options.broker:
            self._set_deadline(BROKER_START_S)
            self._start_broker()
        else:
            self._meeting = self._meet_at_master()
        self._carry_out(self._supervisor.begin())

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, StartWorkers):
                self._set_deadline(None)
                self._start_workers()
            elif isinstance(action, RestartBroker):
                self._screen.end_line()
                _say(
                    f"the broker {_how_it_ended(action.code)}: it is started again, as it may be {action.left} times "
                    "more"
                )
                self._start_broker()
            elif isinstance(action, Report):
                self._report(action)
            elif action is Stop.TERMINATE:
                self._set_deadline(self._options.grace_s)
                for process in self._processes.values():
                    process.terminate()
            else:
                for process in self._processes.values():
                    process.kill()

    def _start_broker(self) -> None:
        argv = [sys.executable, "-u", "-m", "zrpc_broker", "--bind", self._bind]
        self._start(BROKER, -1, argv, {**os.environ, **self._secret}, self._on_broker_line)

    def _on_broker_line(self, text: str) -> None:
        """Runs on the reading thread. The broker's first line says where it listens."""
        if not self._meeting and text.startswith(READY_PREFIX):
            port = int(text.rpartition(":")[2])
            self._bind = f"{self._bind.rpartition(':')[0]}:{port}"  # for one that takes its place
            host = self._options.advertise or (LOCALHOST if self._reach is Reach.LOCAL else own_address(self._hosts[0]))
            self._meeting = meet_at_broker(host, port)
            self._put(Supervisor.broker_listens)

    def _meet_at_master(self) -> dict[str, str]:
        is_local = self._reach is Reach.LOCAL
        port = self._options.master_port or (_free_port() if is_local else REMOTE_MASTER_PORT)
        host = self._options.advertise or self._hosts[0].rpartition("@")[2]
        return meet_at_master(host, port, spread=not is_local)

    def _start_workers(self) -> None:
        for index, (name, spot) in enumerate(self._places.items()):
            told = worker_environment(spot, self._options.workers, self._meeting, self._options.grace_s)
            if self._reach is Reach.LOCAL:
                argv = self._options.program.argv()
                environment = local_environment(os.environ, told, spot.local_world_size, os.cpu_count() or 1)
                answers = {}
            else:
                asked = self._secret if self._reach is Reach.SSH else {}
                argv = remote_command(
                    self._reach, spot.host, self._options.program, told, os.environ, asks_secret=bool(asked)
                )
                environment = dict(os.environ)
                answers = dict.fromkeys([SECRET_QUESTION], *asked.values()) if asked else {}
            self._start(name, index, argv, {**environment, **self._secret}, answers=answers)

    def _start(
        self,
        name: str,
        colour: int,
        argv: list[str],
        environment: Mapping[str, str],
        on_line: Callable[[str], None] | None = None,
        answers: Mapping[str, str] | None = None,
    ) -> None:
        try:
            self._processes[name] = ManagedProcess(
                name, colour, argv, environment, self._screen, self._on_exit, on_line, answers
            )
        except (OSError, LimitError) as error:
            _say(f"{name} cannot be started: {error}")
            self._put(partial(Supervisor.exited, name=name, code=127))

    def _report(self, failed: Report) -> None:
        """Which process ended the cluster, how, and what it said last."""
        self._screen.end_line()
        process = self._processes.get(failed.name)
        if process is None:
            return
        host = self._places[failed.name].host if failed.name in self._places else LOCALHOST
        where = "" if self._reach is Reach.LOCAL else f" on {host}"
        last = "".join(f"    {line}\n" for line in process.last_lines)
        _say(f"{failed.name}{where} (pid {process.pid}) {_how_it_ended(failed.code)}, and the cluster ends with it.")
        if self._reach is Reach.SSH and failed.code == SSH_FAILED:
            _say(f"ssh could not reach {host}, or broke off: try `ssh {host} true` (without a password, by key)")
        print(f"Its last lines:\n{last}", end="", file=sys.stderr, flush=True)


def choose_reach(options: Launch) -> Reach:
    """How the workers are started.

    Raises:
        ConfigError: the options contradict each other, or the program that reaches the hosts is not here.
    """
    if options.ssh and options.srun:
        raise ConfigError("--ssh and --srun exclude each other: choose one")
    if options.hosts is None:
        if options.ssh or options.srun:
            raise ConfigError("--ssh and --srun need --hosts a,b")
        return Reach.LOCAL
    if not options.ssh and not options.srun:
        raise ConfigError("--hosts needs --ssh or --srun: the way to reach them")
    command = "ssh" if options.ssh else "srun"
    if shutil.which(command) is None:
        raise ConfigError(f"there is no {command} on this machine: install it, or leave out --{command}")
    return Reach.SSH if options.ssh else Reach.SRUN


def own_address(host: str) -> str:
    """The address of this machine that `host` is likely to reach it by; its name where that cannot be told."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host.rpartition("@")[2], 9))  # a datagram socket's connect sends nothing
        return str(probe.getsockname()[0])
    return socket.getfqdn()


def _free_port() -> int:
    with socket.create_server((LOCALHOST, 0)) as server:
        return int(server.getsockname()[1])


def _name(spot: Place) -> str:
    return f"worker {spot.rank}"


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _say(text: str) -> None:
    print(f"zrpc launch: {text}", file=sys.stderr)
