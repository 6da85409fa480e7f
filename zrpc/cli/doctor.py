"""`zrpc doctor`: what will not work here, why, and what to do. Exit code 1 where something fails."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING

import typer

from zrpc.cli import checks, text
from zrpc.cli.findings import Finding, Level, run
from zrpc.cli.sight import Address, InitMethod, Json, Pid, Timeout, find, look, tell
from zrpc.errors import RendezvousError, ZrpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.sight.observer import Observer

NEEDED = ("secret", "keys", "meeting point")
"""Where one of these fails, the group is not looked for."""
CLOCK_MAX_S = 1.0
"""Clocks of hosts that differ by more make their logs hard to read together."""


def doctor(
    init_method: InitMethod = None,
    address: Address = None,
    pid: Pid = None,
    timeout: Timeout = 3.0,
    as_json: Json = False,
) -> None:
    """Look whether workers will run here, and say what to do where not. With a group: also whether its workers do."""
    findings = []
    for finding in run(checks.LOCAL):
        findings.append(finding)
        if not as_json:
            _show(finding)
    is_reachable = all(
        one.level is not Level.FAIL for one in findings if one.about in ("secret", "keys", "meeting point")
    )
    if (init_method or address or pid is not None) and is_reachable:
        for finding in group(init_method, address, pid, timeout):
            findings.append(finding)
            if not as_json:
                _show(finding)
    if as_json:
        tell([{**vars(finding), "level": finding.level.value} for finding in findings])
    failed = sum(finding.level is Level.FAIL for finding in findings)
    if failed:
        raise typer.Exit(1)


def group(init_method: str | None, address: str | None, pid: int | None, timeout_s: float) -> Iterator[Finding]:
    """What there is to find at the workers of a group, if it runs."""
    try:
        with find(init_method, address, pid, timeout_s) as observer:
            yield from workers(observer, timeout_s)
    except RendezvousError as error:
        yield Finding("group", Level.WARN, f"none runs there now: {error}", "start its workers, or look elsewhere")
    except ZrpcError as error:
        yield Finding("group", Level.FAIL, str(error), "see docs/sight.md, Which group")


def workers(observer: Observer, timeout_s: float) -> Iterator[Finding]:
    """What there is to find at the workers of a running group."""
    report = look(observer, timeout_s)
    yield Finding("group", Level.OK, text.group_line(report))
    for worker in report["workers"]:
        about = worker["name"]
        if not worker["answers"]:
            yield Finding(about, Level.FAIL, worker["why"], "zrpc stacks shows what a worker that answers is at")
            continue
        yield Finding(about, Level.OK, f"it answers, in {text.duration(worker['ping_s'])}")
        yield from _versions(about, worker)
        lives = [one.incarnation for one in observer.group.members if one.incarnation.hex() == worker["life"]]
        yield from _clock(about, observer, lives[0], timeout_s)


def _versions(about: str, worker: dict[str, str]) -> Iterator[Finding]:
    import importlib.metadata

    for what, here in (("python", platform.python_version()), ("torch", importlib.metadata.version("torch"))):
        there = worker[what]
        if there != here:
            yield Finding(about, Level.WARN, f"it has {what} {there}, and this host has {here}",
                          "use one version for all workers")  # fmt: skip


def _clock(about: str, observer: Observer, life: bytes, timeout_s: float) -> Iterator[Finding]:
    answer = observer.ask([life], "ping", timeout_s=timeout_s)[life]
    if answer.seen is None:
        return
    ahead_s = answer.seen["time"] - (time.time() - answer.took_s / 2)
    if abs(ahead_s) > CLOCK_MAX_S:
        yield Finding(about, Level.WARN, f"its clock is {text.duration(abs(ahead_s))} "
                      f"{'ahead of' if ahead_s > 0 else 'behind'} that of this host",
                      "run NTP on both: no call depends on it, but logs of both are hard to compare")  # fmt: skip


def _show(finding: Finding) -> None:
    typer.echo(f"{finding.level.value:<5} {finding.about}: {finding.text}")
    if finding.level is not Level.OK and finding.todo:
        typer.echo(f"      {finding.todo}")
