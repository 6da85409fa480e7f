"""One process of a cluster, and what is left of its group when it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.waiting import until
from zrpc.cli.output import Screen
from zrpc.cli.process import ManagedProcess
from zrpc.errors import LimitError

PATIENCE_S = 30.0
LEAVES_A_CHILD = """
import os, sys, time
child = os.fork()
if not child:
    time.sleep(600)
print(child, flush=True)
sys.exit(3)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is looked at")


def start(code: str, ended: SimpleQueue[int], lines: list[str]) -> ManagedProcess:
    return ManagedProcess(
        "worker",
        0,
        [sys.executable, "-c", code],
        os.environ,
        Screen(io.StringIO(), 6),
        lambda _, exit_code: ended.put(exit_code),
        lines.append,
    )


def is_there(pid: int) -> bool:
    """Whether there is such a process, maybe one that has ended and is not reaped."""
    return Path(f"/proc/{pid}").exists()


def test_no_signal_goes_to_a_group_whose_leader_is_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process leaves behind is ended while its number is still its own; later signals go nowhere."""
    sent: list[tuple[int, bool]] = []
    killpg = os.killpg

    def watched(group: int, number: int) -> None:
        sent.append((number, is_there(group)))
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", watched)
    ended: SimpleQueue[int] = SimpleQueue()
    lines: list[str] = []
    process = start(LEAVES_A_CHILD, ended, lines)
    assert ended.get(timeout=PATIENCE_S) == 3
    process.terminate()
    process.kill()
    assert sent == [(signal.SIGKILL, True)]
    assert not is_there(process.pid)
    until(lambda: not is_running(int(lines[0])), "its child has ended")


def is_running(pid: int) -> bool:
    """Whether that process runs: whoever adopted it may not have reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("num_started", [0, 1])
def test_a_process_whose_threads_cannot_be_started_is_ended(monkeypatch: pytest.MonkeyPatch, num_started: int) -> None:
    """The system gives no thread: the error says so, and no process is left."""
    pids: list[int] = []
    begun = threading.Thread.start
    left = [None] * num_started

    def refuse(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        begun(thread)

    killpg = os.killpg

    def watched(group: int, number: int) -> None:
        pids.append(group)
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", watched)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(LimitError, match="cannot be started"):
        start("import time; time.sleep(600)", SimpleQueue(), [])
    assert len(pids) == 1
    assert not is_there(pids[0])
