"""What to start, where, with which command and environment. Pure: options in, commands out."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from zrpc.errors import ConfigError
from zrpc.secret import FILE_VARIABLE, VARIABLE, make_secret, says_insecure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HOST = re.compile(r"^([A-Za-z0-9._-]+@)?[A-Za-z0-9\[][A-Za-z0-9._:\[\]-]*$")
_REPLACED = ("ZRPC_BROKER", "ZRPC_INIT_METHOD", "MASTER_ADDR", "MASTER_PORT")
_HIDDEN = (VARIABLE,)
"""Never on a command line, which all users of a host can read."""
"""What an enclosing launch may have left in the environment, and would send a worker to the wrong place."""


DRAIN_SHARE = 0.7
"""How much of the time in which it is to end a worker may take for calls that run; the rest is for its exit."""
SECRET_QUESTION = "zrpc launch: the secret, please"
_ASK_SECRET = (
    f"stty -echo 2>/dev/null; echo '{SECRET_QUESTION}'; IFS= read -r {VARIABLE} && export {VARIABLE}; "
    "stty echo 2>/dev/null"
)

BROKER_RESTARTS = 3


class Reach(Enum):
    """How a command comes to run on a host."""

    LOCAL = "on this machine"
    SSH = "by ssh"
    SRUN = "by Slurm's srun"


@dataclass(frozen=True, slots=True)
class Program:
    """What every worker runs.

    Attributes:
        script: a Python file, or a module's name.
        is_module: which of the two.
        args: its arguments.
        python: the interpreter.
        directory: where to run it.
    """

    script: str
    is_module: bool
    args: tuple[str, ...]
    python: str
    directory: str

    def argv(self) -> list[str]:
        flags = ["-u", "-m"] if self.is_module else ["-u"]
        return [self.python, *flags, self.script, *self.args]


@dataclass(frozen=True, slots=True)
class Launch:
    """What the user asked for.

    Attributes:
        program: what every worker runs.
        workers: how many.
        broker: whether they meet at a broker, which is then started too.
        hosts: where they run, as `a,b`; None: on this machine.
        ssh: reach the hosts by ssh.
        srun: reach them by Slurm's srun.
        bind: where the broker listens; None: on the loopback interface, or everywhere if there are hosts.
        advertise: under which name or number the hosts reach this machine; None: found out.
        master_port: without a broker, the port that rank 0 listens on; None: any free one.
        grace_s: how long processes may take to end when they are told to.
        broker_restarts: how often a broker that ends while the workers run is started again.
    """

    program: Program
    workers: int
    broker: bool
    hosts: str | None = None
    ssh: bool = False
    srun: bool = False
    bind: str | None = None
    advertise: str | None = None
    master_port: int | None = None
    grace_s: float = 5.0
    broker_restarts: int = BROKER_RESTARTS


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker runs."""

    rank: int
    host: str
    local_rank: int
    local_world_size: int


def place(workers: int, hosts: Sequence[str]) -> list[Place]:
    """Spread ranks over hosts in blocks, as evenly as they divide.

    Raises:
        ConfigError: fewer workers than hosts, or none at all.
    """
    if workers < 1:
        raise ConfigError(f"-n is {workers}: it must be 1 or more")
    if workers < len(hosts):
        raise ConfigError(
            f"{workers} worker(s) cannot be spread over {len(hosts)} hosts: name fewer hosts, or raise -n"
        )
    fewest, more = divmod(workers, len(hosts))
    sizes = [fewest + (index < more) for index in range(len(hosts))]
    slots = [(host, local, size) for host, size in zip(hosts, sizes, strict=True) for local in range(size)]
    return [Place(rank, host, local, size) for rank, (host, local, size) in enumerate(slots)]


def parse_hosts(text: str) -> list[str]:
    """The hosts of `a,b` or `user@a,user@b`.

    Raises:
        ConfigError: there is none, one is named twice, or one is not a host's name.
    """
    hosts = [part.strip() for part in text.split(",") if part.strip()]
    if not hosts:
        raise ConfigError("--hosts names no host: write them as --hosts a,b")
    for host in hosts:
        if not _HOST.match(host):
            raise ConfigError(f"--hosts: {host!r} is not the name of a host")
    if len(set(hosts)) < len(hosts):
        raise ConfigError("--hosts names a host twice: name it once, workers are spread evenly")
    return hosts


def worker_environment(
    where: Place, world_size: int, meeting: Mapping[str, str], grace_s: float = 5.0
) -> dict[str, str]:
    """What a worker is told by its environment.

    Args:
        where: it is.
        world_size: how many there are.
        meeting: says how it finds the others.
        grace_s: how long it may take to end when it is told to.
    """
    return {
        "ZRPC_DRAIN_ON_SIGTERM": f"{DRAIN_SHARE * grace_s:g}",
        "RANK": str(where.rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(where.local_rank),
        "LOCAL_WORLD_SIZE": str(where.local_world_size),
        **meeting,
    }


def meet_at_broker(host: str, port: int) -> dict[str, str]:
    """How workers find each other through a broker."""
    shown = f"[{host}]" if ":" in host else host
    address = f"broker://{shown}:{port}"
    return {"ZRPC_BROKER": address, "ZRPC_INIT_METHOD": address}


def meet_at_master(host: str, port: int, spread: bool) -> dict[str, str]:
    """How workers find each other without one; `spread` over hosts, they must listen off the loopback interface."""
    meeting = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "ZRPC_INIT_METHOD": "env://"}
    return {**meeting, "ZRPC_BIND": "tcp://0.0.0.0:0"} if spread else meeting


def local_environment(
    inherited: Mapping[str, str], told: Mapping[str, str], local_world_size: int, cores: int
) -> dict[str, str]:
    """The whole environment of a worker on this machine; the cores are shared out, unless the user has done so."""
    kept = {name: value for name, value in inherited.items() if name not in _REPLACED}
    return {"OMP_NUM_THREADS": str(max(1, cores // local_world_size)), **kept, **told}


def remote_command(
    reach: Reach,
    host: str,
    program: Program,
    told: Mapping[str, str],
    inherited: Mapping[str, str],
    *,
    asks_secret: bool = False,
) -> list[str]:
    """The local command that runs `program` on `host`.

    Other hosts do not get this machine's environment: what a worker is told goes into the command, and so do the
    variables whose names begin with ZRPC_, but for the secret. With ssh that is asked for on a line of its own,
    `SECRET_QUESTION`, and read from the standard input; srun hands the environment on.
    """
    ours = {
        name: value
        for name, value in inherited.items()
        if name.startswith("ZRPC_") and name not in (*_REPLACED, *_HIDDEN)
    }
    assignments = [f"{name}={value}" for name, value in {**ours, **told}.items()]
    command = ["env", *assignments, *program.argv()]
    if reach is Reach.SRUN:
        one_here = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap", "--kill-on-bad-exit=1"]
        return ["srun", *one_here, f"--chdir={program.directory}", *command]
    # -tt: with a terminal of its own the remote process gets a hang-up signal when this ssh ends.
    line = f"cd {shlex.quote(program.directory)} && exec {shlex.join(command)}"
    if asks_secret:
        line = f"{_ASK_SECRET}; {line}"
    return ["ssh", "-tt", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "--", host, line]


def secret_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The secret of a run, as its processes are told it: one of its own, unless the user has chosen otherwise.

    Raises:
        ConfigError: the environment says neither yes nor no to `insecure`.
    """
    if says_insecure() or FILE_VARIABLE in inherited:
        return {}
    return {VARIABLE: inherited.get(VARIABLE) or make_secret()}


def check_script(program: Program, reach: Reach) -> None:
    """Whether there is something to run; on other hosts nobody can tell from here.

    Raises:
        ConfigError: there is no such file.
    """
    if reach is Reach.LOCAL and not program.is_module and not os.path.isfile(program.script):
        raise ConfigError(f"there is no script {program.script!r}: check the path (for a module, add -m)")
