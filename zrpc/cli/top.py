"""`zrpc top`: the workers of a group and their oldest calls, live in the terminal."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zrpc.cli import text
from zrpc.cli.sight import EXIT_SILENT, EXIT_USAGE, Address, InitMethod, Json, Pid, Timeout, attached, look, tell
from zrpc.errors import RendezvousError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from zrpc.sight.observer import Observer

NO_RICH = "zrpc top needs the package rich: pip install 'zrpc[cli]'. Without it: zrpc status"
CALLS_SHOWN = 15
WIDE = 130
"""Columns that all is shown on; on fewer, `NARROW`."""
NARROW = ("NAME", "UP", "PING", "OUT", "RUNS", "QUEUED", "MEMORY", "CALLS/S")
PLAIN_WIDTH = 160
"""Where the output is no terminal."""
AGES = ((10.0, "red"), (1.0, "yellow"))
"""From which age on a call has which colour, in seconds."""


class Rates:
    """Calls and bytes a second, of what two looks have counted."""

    def __init__(self) -> None:
        self._at = 0.0
        self._before: dict[str, tuple[int, int, int]] = {}

    def add_to(self, report: dict[str, Any], now: float) -> None:
        """Give each worker of `report` its rates since the last one; None: they are not known yet."""
        passed_s, counted = now - self._at, {}
        for worker in report["workers"]:
            rates = None
            if "up_s" in worker:
                numbers = (worker["calls_made"], worker["sent_nbytes"], worker["received_nbytes"])
                counted[worker["life"]] = numbers
                before = self._before.get(worker["life"])
                if before is not None and passed_s > 0:
                    rates = [max(0.0, new - old) / passed_s for new, old in zip(numbers, before, strict=True)]
            worker["rates"] = (
                dict(zip(("calls", "sent_nbytes", "received_nbytes"), rates, strict=True)) if rates else None
            )
        self._at, self._before = now, counted


def render(report: dict[str, Any], width: int) -> RenderableType:
    """One picture of `report`, for so many columns of text."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    workers = Table(box=None, header_style="bold", pad_edge=False)
    names = (*text.COLUMNS, "CALLS/S", "TCP OUT/S", "TCP IN/S")
    shown = [place for place, name in enumerate(names) if width >= WIDE or name in NARROW]
    for name in (names[place] for place in shown):
        workers.add_column(name, justify="left" if name in ("NAME", "HOST") else "right", no_wrap=True)
    for worker in report["workers"]:
        rates = worker.get("rates")
        told = ["-"] * 3 if rates is None else [
            f"{rates['calls']:.0f}", text.size(rates["sent_nbytes"]), text.size(rates["received_nbytes"])
        ]  # fmt: skip
        style = None if worker["answers"] else "red"
        cells = [*text.worker_row(worker), *told]
        workers.add_row(*(escape(str(cells[place])) for place in shown), style=style)
    calls = Table(box=None, header_style="bold", pad_edge=False)
    for name in text.CALL_COLUMNS:
        calls.add_column(name, justify="right" if name in ("AGE", "LIMIT") else "left", overflow="fold")
    for call in report["calls"][:CALLS_SHOWN]:
        style = next((colour for age_s, colour in AGES if call["age_s"] >= age_s), None)
        calls.add_row(*(escape(str(cell)) for cell in text.call_row(call)), style=style)
    silent = [
        f"[red]{escape(worker['name'])}: {escape(worker['why'])}[/red]"
        for worker in report["workers"]
        if not worker["answers"]
    ]
    head = f"[bold]{escape(text.group_line(report))}[/bold]; {len(report['calls'])} calls under way"
    return Group(head, "", workers, *silent, "", calls)


def top(
    init_method: InitMethod = None,
    address: Address = None,
    pid: Pid = None,
    timeout: Timeout = 3.0,
    as_json: Json = False,
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 1.0,
    count: Annotated[int | None, typer.Option("-n", "--count", min=1, help="so many looks, then end")] = None,
) -> None:
    """Show the workers of a running group and their oldest calls, live. Ctrl-C ends it."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        typer.echo(NO_RICH, err=True)
        raise typer.Exit(EXIT_USAGE) from error
    with attached("top", init_method, address, pid, timeout) as observer:
        rates, console = Rates(), Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        try:
            if as_json or not console.is_terminal:
                for report in _reports(observer, rates, timeout, interval, count):
                    tell(report) if as_json else console.print(render(report, PLAIN_WIDTH))
            else:
                with Live(console=console, screen=True, auto_refresh=False) as live:
                    for report in _reports(observer, rates, timeout, interval, count):
                        live.update(render(report, console.width), refresh=True)
        except KeyboardInterrupt:
            return
        if report["silent"]:
            raise typer.Exit(EXIT_SILENT)


def _reports(
    observer: Observer, rates: Rates, timeout_s: float, interval_s: float, count: int | None
) -> Iterator[dict[str, Any]]:
    """Looks at the group, again and again. Where it is gone for now, the last one's members are asked."""
    number = 0
    while True:
        report = look(observer, timeout_s)
        rates.add_to(report, time.monotonic())
        yield report
        number += 1
        if number == count:
            return
        time.sleep(interval_s)
        with suppress(RendezvousError):
            observer.refresh()
