"""The console command `zrpc`, and the commands that scripts/ holds.

Each command imports what it needs when it is called: a broker should start at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from zrpc.cli import doctor, keys, sight, top, trace
from zrpc.cli.plan import BROKER_RESTARTS, Launch, Program
from zrpc.errors import ConfigError, ZrpcError
from zrpc_broker import defaults

EXIT_USAGE = 2
_VERBATIM = {"allow_interspersed_args": False}
"""Everything behind the script is the script's."""

Script = Annotated[str, typer.Argument(help="Python file that every worker runs", show_default=False)]
Args = Annotated[list[str] | None, typer.Argument(help="its arguments", show_default=False)]
Workers = Annotated[int, typer.Option("-n", "--workers", help="number of workers", show_default=False)]
Module = Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module's name")]
Python = Annotated[str, typer.Option(help="interpreter of the workers")]
Hosts = Annotated[str | None, typer.Option(help="run on these hosts, a,b, instead of on this machine")]
Ssh = Annotated[bool, typer.Option("--ssh", help="reach the hosts by ssh")]
Srun = Annotated[bool, typer.Option("--srun", help="reach the hosts by Slurm's srun")]
Bind = Annotated[str | None, typer.Option(help="where the broker listens, tcp://HOST:PORT")]
Advertise = Annotated[str | None, typer.Option(help="name or number under which workers reach the broker, or rank 0")]
MasterPort = Annotated[int | None, typer.Option(help="without a broker: port that rank 0 listens on")]
Grace = Annotated[float, typer.Option(help="seconds that workers may take to end when told to")]
Restarts = Annotated[int, typer.Option(min=0, help="how often a broker that ends is started again")]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(keys.app, name="keys")
for _command in (sight.status, top.top, sight.ping, sight.stacks, trace.trace, doctor.doctor):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"zrpc {importlib.metadata.version('zrpc')}")
        raise typer.Exit


@app.callback()
def _zrpc(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """PyTorch's RPC framework on ZeroMQ."""


@app.command("broker")
def _broker(
    bind: Annotated[str, typer.Option(help="where to listen; port 0: any free one")] = defaults.BIND,
    heartbeat_interval: Annotated[float, typer.Option(help="seconds between a worker's heartbeats")] = (
        defaults.HEARTBEAT_INTERVAL_S
    ),
    missed: Annotated[int, typer.Option(help="missed heartbeats that make a worker lost")] = defaults.MISSED_MAX,
    verbose: Annotated[bool, typer.Option("--verbose", help="log who comes and goes")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="let anybody in who reaches the port")] = False,
) -> None:
    """Keep who is in which group, and relay messages between workers."""
    from zrpc_broker.main import serve

    raise typer.Exit(serve(bind, heartbeat_interval, missed, verbose, insecure or None))


@app.command("launch", context_settings=_VERBATIM)
def _launch(
    script: Script,
    workers: Workers,
    args: Args = None,
    broker: Annotated[bool, typer.Option("--broker/--no-broker", help="workers meet at a broker, or at rank 0")] = True,
    module: Module = False,
    python: Python = sys.executable,
    hosts: Hosts = None,
    ssh: Ssh = False,
    srun: Srun = False,
    bind: Bind = None,
    advertise: Advertise = None,
    master_port: MasterPort = None,
    grace: Grace = 5.0,
    broker_restarts: Restarts = BROKER_RESTARTS,
) -> None:
    """Run a script as a cluster of workers."""
    program = Program(script, module, tuple(args or ()), python, os.getcwd())
    _run(Launch(program, workers, broker, hosts, ssh, srun, bind, advertise, master_port, grace, broker_restarts))


@app.command("drain")
def _drain(
    worker: Annotated[str, typer.Argument(help="name of the worker", show_default=False)],
    init_method: Annotated[
        str, typer.Option(help="where its group meets", envvar="ZRPC_INIT_METHOD", show_default=False)
    ],
) -> None:
    """Have a worker of a group that grows and shrinks take no new calls, and finish those that run."""
    from zrpc.cli.drain import drain

    try:
        drain(worker, init_method)
    except ZrpcError as error:
        typer.echo(f"zrpc drain: {error}", err=True)
        raise typer.Exit(1) from error


@app.command("run", context_settings=_VERBATIM)
def _program(script: Script, args: Args = None, module: Module = False, python: Python = sys.executable) -> None:
    """Run a program for torch.distributed.rpc on zrpc, with all processes that it starts."""
    from zrpc.compat.children import reaching

    command = [python, *(["-m"] if module else []), script, *(args or ())]
    os.execvpe(python, command, reaching(os.environ))


def _cluster(
    script: Script,
    workers: Workers,
    args: Args = None,
    module: Module = False,
    python: Python = sys.executable,
    hosts: Hosts = None,
    ssh: Ssh = False,
    srun: Srun = False,
    bind: Bind = None,
    advertise: Advertise = None,
    grace: Grace = 5.0,
    broker_restarts: Restarts = BROKER_RESTARTS,
) -> None:
    """Run a script as a cluster of workers with a broker."""
    program = Program(script, module, tuple(args or ()), python, os.getcwd())
    _run(Launch(program, workers, True, hosts, ssh, srun, bind, advertise, None, grace, broker_restarts))


def _peers(
    script: Script,
    workers: Workers,
    args: Args = None,
    module: Module = False,
    python: Python = sys.executable,
    hosts: Hosts = None,
    ssh: Ssh = False,
    srun: Srun = False,
    advertise: Advertise = None,
    master_port: MasterPort = None,
    grace: Grace = 5.0,
) -> None:
    """Run a script as a cluster of workers without a broker."""
    program = Program(script, module, tuple(args or ()), python, os.getcwd())
    _run(Launch(program, workers, False, hosts, ssh, srun, None, advertise, master_port, grace))


def _run(options: Launch) -> None:
    from zrpc.cli.launch import launch

    try:
        code = launch(options)
    except ConfigError as error:
        typer.echo(f"zrpc launch: {error}", err=True)
        code = EXIT_USAGE
    raise typer.Exit(code)


def main() -> None:
    """The command `zrpc`."""
    app()


def main_cluster() -> None:
    """The script `zrpc-cluster`."""
    _alone(_cluster)


def main_peers() -> None:
    """The script `zrpc-peers`."""
    _alone(_peers)


def _alone(command: object) -> None:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(context_settings=_VERBATIM)(command)  # type: ignore[type-var]  # a function with typer's annotations
    single()
