"""What is seen of a group, as text: `zrpc status`, `stacks`, `trace` and one picture of `zrpc top`."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from zrpc.cli import text, top

WORKER: dict[str, Any] = {
    "name": "worker0", "rank": 0, "life": "aa", "pid": 7, "host": "h", "address": None, "answers": True, "why": "",
    "up_s": 65.0, "ping_s": 0.0005, "program": ["job.py"], "python": "3.11", "torch": "2.13", "allow": "any",
    "is_draining": False, "calls_out": 1, "calls_made": 10, "runs": 2, "queued": 3, "handler_threads": 16,
    "threads": 8, "rrefs_owned": 4, "rrefs_owned_types": {"torch.nn.Linear": 4}, "rrefs_used_by_owner": {"worker1": 5},
    "contexts": 1, "contexts_shown": [{"id": 6, "creator": "worker0", "is_in_backward": True}],
    "windows": {"worker1": {"calls": 1, "nbytes": 2048, "waiting": 0, "max_calls": 9, "max_nbytes": 1 << 30,
                            "queued_nbytes": 0}},
    "memory": {"resident_nbytes": 300 << 20, "slabs": 2, "nbytes": 1 << 20, "held": 1, "mapped": 3},
    "sent_nbytes": 1 << 20, "received_nbytes": 0, "connections": [], "ended": [["bb", "it died"]],
}  # fmt: skip
SILENT: dict[str, Any] = {
    "name": "worker1", "rank": 1, "life": "bb", "pid": 8, "host": "h", "answers": False, "why": "it is [stopped]",
}  # fmt: skip
CALL = {
    "id": 1, "function": "train.load", "caller": "worker0", "callee": "worker1", "age_s": 12.5, "limit_s": 0.0,
    "state": "callee does not answer",
}  # fmt: skip


def report() -> dict[str, Any]:
    return {
        "group": {"world_size": 2, "phase": "complete", "here": 2},
        "workers": [dict(WORKER), dict(SILENT)],
        "calls": [CALL],
        "silent": ["worker1"],
    }


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (None, "-"),
        (0.0, "0 us"),
        (4e-5, "40 us"),
        (0.0123, "12.3 ms"),
        (12.0, "12 s"),
        (600.0, "10 min"),
        (9e3, "2.5 h"),
    ],
)
def test_durations_have_a_unit(seconds: float | None, told: str) -> None:
    assert text.duration(seconds) == told


@pytest.mark.parametrize(("nbytes", "told"), [(0, "0 B"), (2048, "2 KiB"), (3 << 29, "1.5 GiB"), (None, "0 B")])
def test_sizes_have_a_unit(nbytes: float | None, told: str) -> None:
    assert text.size(nbytes) == told


def test_status_shows_workers_why_one_is_silent_and_the_oldest_calls() -> None:
    lines = text.status(report(), 10).splitlines()
    assert lines[0] == "2 workers of 2: complete"
    assert re.split(r"\s{2,}", lines[2]) == [
        "worker0", "0", "7", "h", "65 s", "500 us", "1", "2/16", "3", "4 own, 5 use", "1", "300 MiB",
    ]  # fmt: skip
    assert "worker1: it is [stopped]" in lines
    assert re.split(r"\s{2,}", lines[-1]) == [
        "12.5 s", "train.load", "worker0", "worker1", "callee does not answer", "none",
    ]  # fmt: skip


def test_the_details_of_a_worker_are_all_that_is_known_of_it() -> None:
    told = text.detail(report()["workers"][0])
    for part in (
        "window to worker1: 1 calls, 2 KiB of 1 GiB", "RRefs owned: 4 of torch.nn.Linear", "RRefs used: 5 of worker1",
        "autograd context 6 of worker0, in backward", "ended: bb (it died)", "10 requests were made so far",
    ):  # fmt: skip
        assert part in told
    assert "it is [stopped]" in text.detail(report()["workers"][1])


def test_stacks_show_code_of_users_and_leave_threads_that_wait_for_work_out() -> None:
    own = ["/x/zrpc/agent/pool.py", 3, "Pool.work", "get()"]
    seen = {
        "worker": {"rank": 0, "pid": 7, "host": "h"},
        "threads": [
            {"name": "zrpc-handler-0", "id": 9, "frames": [own, ["/job.py", 5, "load", "gate.wait()"]],
             "serves": {"id": 1, "from": "worker1", "function": "job.load"}, "waits_for": None},
            {"name": "zrpc-handler-1", "id": 10, "frames": [own], "serves": None, "waits_for": None},
        ],
    }  # fmt: skip
    assert text.stacks("worker0", seen, shows_all=False).splitlines() == [
        "worker0 (rank 0), process 7 on h",
        "",
        "zrpc-handler-0 (thread 9) serves job.load of worker1",
        "  /job.py:5 in load",
        "    gate.wait()",
        "",
        "1 threads of zrpc's own that wait for work are left out (--all shows them)",
    ]
    assert text.stacks("worker0", seen, shows_all=True).count("/x/zrpc/agent/pool.py:3 in Pool.work") == 2


def test_an_event_of_a_trace_is_a_line() -> None:
    line = text.event([1.25, "in", "job.load", "worker1", 0.002, "ok"])
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.250  from worker1  job.load  2 ms  ok", line)


@pytest.mark.parametrize("width", [80, 160])
def test_a_picture_of_top_has_the_workers_and_calls_at_any_width(width: int) -> None:
    """Columns are left out where there is no room for them; markup in names is shown as it is."""
    rates, first, second = top.Rates(), report(), report()
    rates.add_to(first, 1.0)
    second["workers"][0]["calls_made"] = 30
    rates.add_to(second, 2.0)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(top.render(second, width))
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert "2 workers of 2: complete; 1 calls under way" in told
    assert re.search(r"worker0 .*65 s +500 us .* 20( |$)", told, re.MULTILINE)
    assert "worker1: it is [stopped]" in told
    assert re.search(r"12.5 s +train.load +worker0 +worker1 +callee", told)
    assert ("HOST" in told) == (width == 160)
