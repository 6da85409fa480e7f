"""Why a worker does not answer, as far as the system tells, and what to do."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zrpc.membership.group import Member
    from zrpc.sight.observer import Answer

_STATES = {
    "T": "its process is stopped (SIGSTOP): `kill -CONT {pid}` has it go on",
    "t": "its process is stopped by a debugger",
    "D": "its process waits for a disk or a device",
    "Z": "its process has ended, and its parent has not noticed",
    "X": "its process has ended",
}
_HELD = (
    "its process runs, and does not answer: code in C, or in another language, holds Python's lock. "
    "`py-spy dump --native --pid {pid}` shows where (pip install py-spy; it may need root)"
)


def why_silent(member: Member, answer: Answer | None) -> str:
    """Why `member` has not answered; for people."""
    if answer is not None and answer.lost:
        return f"it cannot be reached: {answer.lost}"
    pid, host = member.card.get("pid"), member.card.get("host")
    if pid is None or host is None:
        return "it does not answer: its process stands still, its zrpc is older, or it does not let this process look"
    if host != socket.gethostname():
        return f"it does not answer: look at process {pid} on host {host}: `py-spy dump --native --pid {pid}` there"
    state = _state_of(pid)
    if state is None:
        return f"there is no process {pid} on this host any more: it has died"
    return _STATES.get(state, _HELD).format(pid=pid)


def _state_of(pid: int) -> str | None:
    """The letter that the kernel gives for the state of a process; None: there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None
