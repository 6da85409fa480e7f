"""`zrpc trace`: the calls of one worker as they end, those that it makes and those that it serves."""

from __future__ import annotations

import json
import queue
import time
from typing import Annotated, Any

import typer

from zrpc.cli import text
from zrpc.cli.sight import EXIT_SILENT, Address, InitMethod, Json, Pid, Timeout, Worker, attached, member_of
from zrpc.cli.silence import why_silent

RENEW_S = 1.0
"""How often the worker is asked to go on."""


def trace(
    worker: Worker,
    init_method: InitMethod = None,
    address: Address = None,
    pid: Pid = None,
    timeout: Timeout = 3.0,
    as_json: Json = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="how long to look")] = 10.0,
) -> None:
    """Show the calls of a worker as they end: peer, function, duration, outcome. It traces while this looks."""
    with attached("trace", init_method, address, pid, timeout) as observer:
        member = member_of(observer, worker)
        answer = observer.ask([member.incarnation], "ping", timeout_s=timeout)[member.incarnation]
        if answer.seen is None:
            typer.echo(f"zrpc trace: {member.info.name}: {why_silent(member, answer)}", err=True)
            raise typer.Exit(EXIT_SILENT)
        came: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        number = observer.follow(member.incarnation, "trace", {}, lambda _, seen: came.put(seen))
        until = time.monotonic() + seconds
        renew_at, heard_at = time.monotonic() + RENEW_S, time.monotonic()
        if not as_json:
            typer.echo(f"{member.info.name}, for {text.duration(seconds)}; Ctrl-C ends it", err=True)
        try:
            while (now := time.monotonic()) < until:
                if now >= renew_at:
                    observer.again(member.incarnation, "trace", {}, number)
                    renew_at = now + RENEW_S
                try:
                    seen = came.get(timeout=max(0.0, min(until, renew_at) - now))
                except queue.Empty:
                    if now - heard_at > timeout + RENEW_S:
                        typer.echo(f"zrpc trace: {member.info.name}: {why_silent(member, None)}", err=True)
                        raise typer.Exit(EXIT_SILENT) from None
                    continue
                heard_at = now
                _show(seen, as_json)
        except KeyboardInterrupt:
            return


def _show(seen: dict[str, Any], as_json: bool) -> None:
    names = ("time", "way", "function", "peer", "took_s", "outcome")
    for event in seen.get("events", []):
        typer.echo(json.dumps(dict(zip(names, event, strict=True))) if as_json else text.event(event))
    if seen.get("dropped"):
        typer.echo(f"{seen['dropped']} more calls ended than could be told", err=True)
