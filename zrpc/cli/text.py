"""What is seen of a group, as text for a terminal. Pure."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

COLUMNS = ("NAME", "RANK", "PID", "HOST", "UP", "PING", "OUT", "RUNS", "QUEUED", "RREFS", "CONTEXTS", "MEMORY")
CALL_COLUMNS = ("AGE", "FUNCTION", "FROM", "TO", "STATE", "LIMIT")


def duration(seconds: float | None) -> str:
    """A time span in two or three digits and a unit."""
    if seconds is None:
        return "-"
    for limit, unit, factor in ((1e-3, "us", 1e6), (1.0, "ms", 1e3), (120.0, "s", 1.0), (7200.0, "min", 1 / 60)):
        if abs(seconds) < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:.1f} h"


def size(nbytes: float | None) -> str:
    """A number of bytes."""
    value = float(nbytes or 0)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines, each column as wide as it must be."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def group_line(report: dict[str, Any]) -> str:
    """What group it is, and who is missing."""
    group = report["group"]
    there = f"{group['here']} worker{'' if group['here'] == 1 else 's'}"
    of = f" of {group['world_size']}" if group["world_size"] else ""
    return f"{there}{of}: {group['phase']}"


def worker_row(worker: dict[str, Any]) -> list[object]:
    """One row of `COLUMNS`."""
    known = [worker["name"], worker["rank"], worker["pid"] or "-", worker["host"] or "-"]
    if "up_s" not in worker:
        return [*known, "-", "none", "-", "-", "-", "-", "-", "-"]
    draining = " (drains)" if worker["is_draining"] else ""
    return [
        f"{known[0]}{draining}",
        *known[1:],
        duration(worker["up_s"]),
        duration(worker["ping_s"]),
        worker["calls_out"],
        f"{worker['runs']}/{worker['handler_threads']}",
        worker["queued"],
        f"{worker['rrefs_owned']} own, {sum(worker['rrefs_used_by_owner'].values())} use",
        worker["contexts"],
        size(worker["memory"].get("resident_nbytes")),
    ]


def call_row(call: dict[str, Any]) -> list[object]:
    """One row of `CALL_COLUMNS`."""
    limit = "none" if call["limit_s"] == 0 else duration(call["limit_s"])
    return [duration(call["age_s"]), call["function"], call["caller"], call["callee"], call["state"], limit]


def status(report: dict[str, Any], at_most: int) -> str:
    """The workers, and the oldest calls under way."""
    lines = [group_line(report), *table(COLUMNS, map(worker_row, report["workers"]))]
    lines += [f"{worker['name']}: {worker['why']}" for worker in report["workers"] if not worker["answers"]]
    calls = report["calls"]
    if not calls:
        return "\n".join([*lines, "", "no calls are under way"])
    shown = calls[:at_most]
    if not shown:
        return "\n".join([*lines, "", f"{len(calls)} calls are under way"])
    some = f"the oldest {len(shown)} of {len(calls)}" if len(shown) < len(calls) else "the oldest first"
    return "\n".join([*lines, "", f"calls under way, {some}:", *table(CALL_COLUMNS, map(call_row, shown))])


def detail(worker: dict[str, Any]) -> str:
    """All of one worker, but its calls."""
    lines = [f"{worker['name']} (rank {worker['rank']}), process {worker['pid']} on {worker['host']}"]
    if not worker["answers"]:
        return "\n".join([*lines, f"  {worker['why']}"])
    lines += [
        f"  life {worker['life']}, up for {duration(worker['up_s'])}, listens at {worker['address'] or 'no address'}",
        f"  Python {worker['python']}, torch {worker['torch']}, allow={worker['allow']!r}, "
        f"program {' '.join(worker['program'])}",
        f"  {worker['threads']} threads; {worker['runs']} of at most {worker['handler_threads']} calls run at once, "
        f"{worker['queued']} wait; {worker['calls_made']} requests were made so far",
        f"  memory: {size(worker['memory'].get('resident_nbytes'))} resident; shared: "
        f"{worker['memory'].get('slabs', 0)} regions of {size(worker['memory'].get('nbytes', 0))} to send in "
        f"({worker['memory'].get('held', 0)} held), {worker['memory'].get('mapped', 0)} of others mapped",
        f"  TCP: {size(worker['sent_nbytes'])} sent, {size(worker['received_nbytes'])} received on "
        f"{len(worker['connections'])} connections (local sockets and shared memory are not counted)",
    ]
    lines += [
        f"  window to {name}: {seen['calls']} calls, {size(seen['nbytes'])} of {size(seen['max_nbytes'])}, "
        f"{seen['waiting']} wait for room, {size(seen['queued_nbytes'])} not read yet"
        for name, seen in worker["windows"].items()
    ]
    lines += [f"  RRefs owned: {count} of {kind}" for kind, count in worker["rrefs_owned_types"].items()]
    lines += [f"  RRefs used: {count} of {owner}" for owner, count in worker["rrefs_used_by_owner"].items()]
    lines += [
        f"  autograd context {context['id']} of {context['creator']}{', in backward' * context['is_in_backward']}"
        for context in worker["contexts_shown"]
    ]
    return "\n".join([*lines, *(f"  ended: {life} ({reason})" for life, reason in worker["ended"])])


def stacks(name: str, seen: dict[str, Any], shows_all: bool) -> str:
    """The threads of a worker. Those that wait for work within zrpc are left out, and so are zrpc's own frames."""
    worker = seen["worker"]
    lines = [f"{name} (rank {worker['rank']}), process {worker['pid']} on {worker['host']}"]
    left_out = 0
    for thread in sorted(
        seen["threads"], key=lambda one: (one["name"] != "MainThread", not one["serves"], one["name"])
    ):
        frames = thread["frames"] if shows_all else [frame for frame in thread["frames"] if _is_of_users(frame[0])]
        if not frames and not thread["serves"] and not thread["waits_for"]:
            left_out += 1
            continue
        serves, waits = thread["serves"], thread["waits_for"]
        what = f" serves {serves['function']} of {serves['from']}" if serves else ""
        what += f"{' and' if serves else ''} waits for {waits['function']} at {waits['to']}" if waits else ""
        lines += ["", f"{thread['name']} (thread {thread['id']}){what}"]
        for file, line, function, text in frames:
            lines += [f"  {file}:{line} in {function}", *([f"    {text}"] if text else [])]
    if left_out:
        lines += ["", f"{left_out} threads of zrpc's own that wait for work are left out (--all shows them)"]
    return "\n".join(lines)


def _is_of_users(file: str) -> bool:
    """Whether code of a file is no part of zrpc or of the threads that Python starts."""
    inner = os.path.normpath(file)
    folders = inner.split(os.sep)
    return not {"zrpc", "zmq"} & set(folders) and folders[-1] != "threading.py"


def event(event: list[Any]) -> str:
    """One line of a trace: when it ended, which way it went, its function and peer, how long it took, its outcome."""
    at, way, function, peer, took_s, outcome = event
    clock = time.strftime("%H:%M:%S", time.localtime(at)) + f"{at % 1:.3f}"[1:]
    return f"{clock}  {'to  ' if way == 'out' else 'from'} {peer}  {function}  {duration(took_s)}  {outcome}"
