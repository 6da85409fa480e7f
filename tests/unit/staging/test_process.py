"""The end of another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from zrpc.staging.process import Process

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system does not tell when a process ends")

WAIT_S = 20.0


def test_the_end_of_a_process_is_seen_before_anybody_has_buried_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    process = Process(child.pid)
    assert not process.has_ended()
    assert not process.has_ended(0.01)
    child.send_signal(signal.SIGKILL)
    assert process.has_ended(WAIT_S)
    assert child.wait() == -signal.SIGKILL
    assert process.has_ended(), "its number may be another's now"
    with pytest.raises(OSError, match="No such process"):
        Process(child.pid)


def test_it_holds_one_file_as_long_as_it_is_there() -> None:
    before = len(os.listdir("/proc/self/fd"))
    process = Process(os.getpid())
    assert not process.has_ended()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del process
    assert len(os.listdir("/proc/self/fd")) == before
