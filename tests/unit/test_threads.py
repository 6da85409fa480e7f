"""Threads are gone when they were waited for."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

from zrpc.threads import join

_tls: Any = torch._C


class Slow:
    """Torch's thread-local state lets go of it when its thread has left Python: that takes the interpreter's lock."""

    def __init__(self, gone: list[int]) -> None:
        self._gone = gone

    def __del__(self) -> None:
        self._gone.append(threading.get_native_id())


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux tells which threads there are")
def test_what_torch_keeps_for_a_thread_is_destroyed_before_join_returns() -> None:
    gone: list[int] = []
    for _ in range(100):
        thread = threading.Thread(target=lambda: _tls._stash_obj_in_tls("zrpc.tests.threads", Slow(gone)))
        thread.start()
        assert join(thread)
        assert gone.pop() == thread.native_id
        assert not os.path.exists(f"/proc/self/task/{thread.native_id}")


def test_a_thread_that_goes_on_is_not_waited_for_longer_than_asked() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert not join(thread, 0.01)
    end.set()
    assert join(thread, 10)
