"""A callee whose handler threads are all at work, so that calls to it wait until the test lets it go.

Its main thread attends: it writes its counts into a folder, where the caller reads them without a call.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import zrpc as rpc
from tests.waiting import until
from zrpc.agent.current import current_agent

WAIT_S = 100.0
THREADS = 2
_released = threading.Event()


def occupy() -> None:
    """Keep a thread of this worker until it is let go."""
    assert _released.wait(WAIT_S)


def attend(folder: str) -> None:
    """For the main thread of the callee: until it is let go."""
    told, released = Path(folder, "counts"), Path(folder, "released")

    def tell() -> bool:
        draft = told.with_suffix(".draft")
        draft.write_text(json.dumps(current_agent().counts()))
        draft.rename(told)
        return released.exists()

    until(tell, "the caller lets this worker go", within_s=WAIT_S)
    _released.set()


def counts(folder: str) -> dict[str, int]:
    """The counts of the callee, as it has told them last."""
    path = Path(folder, "counts")
    until(path.exists, "the callee attends")
    found: dict[str, int] = json.loads(path.read_text())
    return found


def queued(folder: str) -> int:
    """How many calls wait at the callee."""
    return counts(folder)["server_queued_calls"]


def await_queued(folder: str, num: int) -> None:
    """Wait until so many calls wait there."""
    until(lambda: queued(folder) == num, f"{num} calls wait at the callee", lambda: counts(folder))


def occupied(to: str, folder: str) -> list[Any]:
    """Calls that keep all threads of `to` that serve calls, the reader that serves quick ones included: their futures.

    The last of them may wait there.
    """
    futures: list[Any] = []

    def are_at_work() -> bool:
        there = counts(folder)
        return there["server_active_calls"] - there["server_queued_calls"] == THREADS + 1

    while not futures or not are_at_work():
        futures.append(rpc.rpc_async(to, occupy, timeout=0))
        until(lambda: counts(folder)["server_active_calls"] == len(futures), "the callee has them")
    return futures


def let_go(folder: str) -> None:
    """The callee's threads go on."""
    Path(folder, "released").touch()
