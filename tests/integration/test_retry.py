"""Calls that are made again when they fail."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import zrpc as rpc
from tests.waiting import until
from zrpc import errors

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

QUICK: dict[str, float] = {"wait": 0.01, "max_wait": 0.02}
_attempts: dict[str, int] = {}
_ends = threading.Event()


def succeed_at(key: str, attempt: int) -> int:
    """Fails before that attempt."""
    _attempts[key] = _attempts.get(key, 0) + 1
    if _attempts[key] < attempt:
        raise LookupError(f"attempt {_attempts[key]}")
    return _attempts[key]


def slow_at_first(key: str) -> int:
    _attempts[key] = _attempts.get(key, 0) + 1
    if _attempts[key] == 1:
        until(lambda: _attempts[key] > 1 or _ends.is_set(), "the second attempt is made")
    return _attempts[key]


def end() -> None:
    _ends.set()


def num_attempts(key: str) -> int:
    return _attempts.get(key, 0)


def by_sync(*args: Any, **kwargs: Any) -> Any:
    return rpc.rpc_sync("worker1", *args, **kwargs)


def by_async(*args: Any, **kwargs: Any) -> Any:
    return rpc.rpc_async("worker1", *args, **kwargs).wait()


def by_await(*args: Any, **kwargs: Any) -> Any:
    async def main() -> Any:
        return await rpc.rpc_async("worker1", *args, **kwargs)

    return asyncio.run(main())


def retry(rank: int) -> None:
    if rank:
        return
    for way in (by_sync, by_async, by_await):
        name = way.__name__
        policy = rpc.RetryPolicy(attempts=3, on=(LookupError,), **QUICK)  # type: ignore[arg-type]
        assert way(succeed_at, args=(f"{name} third", 3), retry=policy) == 3
        with pytest.raises(LookupError, match="attempt 3"):
            way(succeed_at, args=(f"{name} never", 9), retry=policy)
        assert rpc.rpc_sync("worker1", num_attempts, args=(f"{name} never",)) == 3
        others = rpc.RetryPolicy(on=(errors.PeerLostError,), **QUICK)  # type: ignore[arg-type]
        with pytest.raises(LookupError, match="attempt 1"):
            way(succeed_at, args=(f"{name} another error", 9), retry=others)
        limited = rpc.RetryPolicy(attempts=2, on=(errors.RpcTimeoutError,), attempt_timeout=0.3, **QUICK)  # type: ignore[arg-type]
        assert way(slow_at_first, args=(f"{name} slow",), retry=limited) == 2
        patient = rpc.RetryPolicy(attempts=1000, on=(LookupError,), wait=0.2, max_wait=0.2)
        begun = time.monotonic()
        with pytest.raises((LookupError, errors.RpcTimeoutError)):
            way(succeed_at, args=(f"{name} bounded", 1001), retry=patient, timeout=1.0)
        assert time.monotonic() - begun < 30, "1000 attempts would take longer than 200 s"
        with pytest.raises(errors.ConfigError, match="RetryPolicy"):
            way(succeed_at, args=("no policy", 1), retry=3)
        with pytest.raises(TypeError, match="callable"):
            way(3, retry=policy)
    many = [rpc.rpc_async("worker1", succeed_at, args=(f"many {n}", 2), retry=policy) for n in range(500)]
    assert [each.wait() for each in many] == [2] * 500
    assert sum(thread.name == "zrpc-event-loop" for thread in threading.enumerate()) == 1
    waiting = rpc.rpc_async("worker1", slow_at_first, args=("cancelled",), retry=rpc.RetryPolicy())
    until(lambda: rpc.rpc_sync("worker1", num_attempts, args=("cancelled",)) == 1, "it runs")
    assert waiting.cancel()
    with pytest.raises(errors.CallCancelledError, match="a call with retry to worker1 was cancelled"):
        waiting.wait()
    rpc.rpc_sync("worker1", end)
    assert rpc.rpc_sync("worker1", num_attempts, args=("cancelled",)) == 1, "what is cancelled is not made again"


def test_a_call_is_made_again_after_the_errors_that_its_policy_names(cluster_in_each_mode: Cluster) -> None:
    """As often as it says, within the call's time limit; by rpc_sync, rpc_async and in asyncio. It can be cancelled."""
    cluster_in_each_mode.run(retry, 2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"attempts": 0}, "attempts must be a whole number, 1 or more"),
        ({"attempts": 2.5}, "attempts must be a whole number"),
        ({"on": ()}, "on must be a tuple of exception classes"),
        ({"on": LookupError}, "on must be a tuple of exception classes"),
        ({"on": (KeyboardInterrupt,)}, "on must be a tuple of exception classes"),
        ({"wait": -1}, "wait must be 0"),
        ({"max_wait": "1"}, "max_wait must be a number of seconds"),
        ({"attempt_timeout": -1}, "attempt_timeout must be 0"),
    ],
)
def test_a_policy_with_a_wrong_value_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        rpc.RetryPolicy(**wrong)


def without_tenacity(rank: int) -> None:
    sys.modules["tenacity"] = None  # type: ignore[assignment]  # as if it were not installed
    for way in (rpc.rpc_sync, rpc.rpc_async):
        with pytest.raises(errors.ConfigError, match=r"pip install 'zrpc\[retry\]'"):
            way(f"worker{rank}", succeed_at, args=("none", 1), retry=rpc.RetryPolicy())


def test_without_tenacity_the_error_says_what_to_install(cluster: Cluster) -> None:
    cluster.run(without_tenacity, 1)
