"""`zrpc status`, `ping` and `stacks`, and what they share with `trace` and `top`.

A process looks into a running group, and is no member of it.

Exit codes: 0: all is as asked; 1: the group or worker was not found, or does not let this process look; 2: bad input;
3: workers do not answer, or have not come; 4: calls are older than `--stuck-after` says.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zrpc.errors import ConfigError, ZrpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.membership.group import Member
    from zrpc.sight.observer import Answer, Observer

EXIT_NOT_FOUND = 1
EXIT_USAGE = 2
EXIT_SILENT = 3
EXIT_STUCK = 4

_SECRETS = ("ZRPC_SECRET", "ZRPC_SECRET_FILE", "ZRPC_INSECURE")
_ADOPTED = (*_SECRETS, "ZRPC_INIT_METHOD", "ZRPC_GROUP", "ZRPC_LOCAL_DIR")

InitMethod = Annotated[
    str | None,
    typer.Option(
        help="where the group meets: broker://, tcp://, file:// or env://", envvar="ZRPC_INIT_METHOD",
        show_default=False,
    ),
]  # fmt: skip
Address = Annotated[str | None, typer.Option(help="or where one of its workers listens, tcp://HOST:PORT")]
Pid = Annotated[int | None, typer.Option(help="or the process of one of its workers here; its secret is used")]
Timeout = Annotated[float, typer.Option(min=0.05, help="seconds to wait for answers")]
Json = Annotated[bool, typer.Option("--json", help="as JSON, for programs")]
Worker = Annotated[str, typer.Argument(help="name or rank of the worker", show_default=False)]
SomeWorker = Annotated[str | None, typer.Argument(help="name or rank of one worker", show_default=False)]


@contextmanager
def attached(
    command: str, init_method: str | None, address: str | None, pid: int | None, timeout_s: float
) -> Iterator[Observer]:
    """An observer of the group, and its errors as messages and exit codes."""
    try:
        with find(init_method, address, pid, timeout_s) as observer:
            yield observer
    except (ConfigError, ZrpcError) as error:
        typer.echo(f"zrpc {command}: {error}", err=True)
        raise typer.Exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_NOT_FOUND) from error


def find(init_method: str | None, address: str | None, pid: int | None, timeout_s: float) -> Observer:
    """An observer of the group that the options mean. Raises what `zrpc.sight.meeting.observe` does."""
    from zrpc.sight.meeting import observe

    if pid is not None:
        init_method = adopt_environment(pid)
    return observe(init_method if address is None else None, address, pid, timeout_s)


def adopt_environment(pid: int) -> str | None:
    """Take the secret from the environment of a process, as far as it is there: `zrpc launch` makes one for each run.

    Whoever can read that can be the process: the kernel lets in its user and root alone.

    Returns:
        The broker of its group, if the environment names one.
    """
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    pairs = (entry.decode(errors="surrogateescape").partition("=") for entry in raw.split(b"\0"))
    there = {name: value for name, _, value in pairs if name in _ADOPTED}
    if not there.keys().isdisjoint(_SECRETS):
        for name in _SECRETS:
            os.environ.pop(name, None)
    os.environ.update(there)
    method = there.get("ZRPC_INIT_METHOD", "")
    return method if method.startswith("broker://") else None


def member_of(observer: Observer, worker: str) -> Member:
    """The worker of that name or rank.

    Raises:
        UnknownWorkerError: there is none.
    """
    from zrpc.errors import UnknownWorkerError

    for member in observer.group.members:
        if worker in (member.info.name, str(member.info.id)):
            return member
    known = ", ".join(sorted(member.info.name for member in observer.group.members)[:32])
    raise UnknownWorkerError(f"there is no worker {worker!r}: the workers of this group are {known or 'none yet'}")


def look(observer: Observer, timeout_s: float) -> dict[str, Any]:
    """The whole group as it is now; see `zrpc.sight.report`."""
    from zrpc.cli.silence import why_silent
    from zrpc.sight.report import report

    members = {member.incarnation: member for member in observer.group.members}
    answers = observer.ask(members, "status", timeout_s=timeout_s)
    why = {life: why_silent(members[life], answer) for life, answer in answers.items() if answer.seen is None}
    return report(observer.group, answers, why)


def plain(value: Any) -> Any:
    """`value` with bytes as hexadecimal digits, for JSON."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def tell(value: Any) -> None:
    """Print as JSON."""
    typer.echo(json.dumps(plain(value), indent=1))


def status(
    worker: SomeWorker = None,
    init_method: InitMethod = None,
    address: Address = None,
    pid: Pid = None,
    timeout: Timeout = 3.0,
    as_json: Json = False,
    calls: Annotated[int, typer.Option(min=0, help="how many calls to show")] = 20,
    stuck_after: Annotated[
        float | None, typer.Option(help="exit with 4 if a call is older than so many seconds")
    ] = None,
) -> None:
    """Show the workers of a running group, and the calls under way between them."""
    from zrpc.cli import text

    with attached("status", init_method, address, pid, timeout) as observer:
        one = None if worker is None else member_of(observer, worker).info.name
        seen = look(observer, timeout)
    if one is not None:
        seen["workers"] = [row for row in seen["workers"] if row["name"] == one]
        seen["calls"] = [call for call in seen["calls"] if one in (call["caller"], call["callee"])]
        seen["silent"] = [name for name in seen["silent"] if name == one]
    stuck = [call for call in seen["calls"] if stuck_after is not None and call["age_s"] > stuck_after]
    if as_json:
        tell(seen)
    else:
        typer.echo(text.status(seen, calls))
        if one is not None:
            typer.echo("\n" + text.detail(seen["workers"][0]))
    if seen["silent"] or (one is None and seen["group"]["here"] < seen["group"]["world_size"]):
        raise typer.Exit(EXIT_SILENT)
    if stuck:
        typer.echo(f"{len(stuck)} calls are older than {text.duration(stuck_after)}", err=True)
        raise typer.Exit(EXIT_STUCK)


def ping(
    worker: SomeWorker = None,
    init_method: InitMethod = None,
    address: Address = None,
    pid: Pid = None,
    timeout: Timeout = 3.0,
    as_json: Json = False,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="how often to ask")] = 5,
) -> None:
    """Ask workers whether they are there, and how long the answer takes."""
    from zrpc.cli import text
    from zrpc.cli.silence import why_silent

    with attached("ping", init_method, address, pid, timeout) as observer:
        members = observer.group.members if worker is None else [member_of(observer, worker)]
        asked = {member.incarnation: member for member in members}
        found: dict[bytes, list[Answer]] = {life: [] for life in asked}
        for _ in range(count):
            waiting = [life for life, answers in found.items() if all(one.seen is not None for one in answers)]
            for life, answer in observer.ask(waiting, "ping", timeout_s=timeout).items():
                found[life].append(answer)
    rows = [_pinged(asked[life], answers) for life, answers in found.items()]
    for row in rows:
        if not row["answers"]:
            row["why"] = why_silent(next(one for one in members if one.info.name == row["name"]), found[
                bytes.fromhex(row["life"])][-1])  # fmt: skip
    if as_json:
        tell(rows)
    else:
        for row in rows:
            times = ", ".join(f"{name} {text.duration(row[f'{name}_s'])}" for name in ("least", "mean", "most"))
            typer.echo(f"{row['name']}: {times}" if row["answers"] else f"{row['name']}: no answer. {row['why']}")
    if not all(row["answers"] for row in rows):
        raise typer.Exit(EXIT_SILENT)


def _pinged(member: Member, answers: list[Answer]) -> dict[str, Any]:
    took = [answer.took_s for answer in answers if answer.seen is not None]
    return {
        "name": member.info.name,
        "life": member.incarnation.hex(),
        "answers": len(took) == len(answers),
        "least_s": min(took, default=None),
        "mean_s": sum(took) / len(took) if took else None,
        "most_s": max(took, default=None),
    }


def stacks(
    worker: Worker,
    init_method: InitMethod = None,
    address: Address = None,
    pid: Pid = None,
    timeout: Timeout = 3.0,
    as_json: Json = False,
    shows_all: Annotated[bool, typer.Option("--all", help="also zrpc's own threads and frames")] = False,
) -> None:
    """Show the Python stacks of all threads of a worker, without stopping it, and the calls that they serve."""
    from zrpc.cli import text
    from zrpc.cli.silence import why_silent

    with attached("stacks", init_method, address, pid, timeout) as observer:
        member = member_of(observer, worker)
        answer = observer.ask([member.incarnation], "stacks", timeout_s=timeout)[member.incarnation]
    if answer.seen is None:
        typer.echo(f"zrpc stacks: {member.info.name}: {why_silent(member, answer)}", err=True)
        raise typer.Exit(EXIT_SILENT)
    if as_json:
        tell(answer.seen)
    else:
        typer.echo(text.stacks(member.info.name, answer.seen, shows_all))
