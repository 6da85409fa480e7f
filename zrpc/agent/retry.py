"""Calls that are made again when they fail, for functions that may run twice: `rpc_sync` and `rpc_async` with `retry`.

What decides whether and when to try again is tenacity (https://tenacity.readthedocs.io), an optional requirement.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from zrpc.agent.future import Future, settle
from zrpc.agent.pool import blocking
from zrpc.agent.served import serving
from zrpc.config import check_timeout
from zrpc.errors import (
    CallCancelledError,
    ConfigError,
    ConnectionLostError,
    OverloadedError,
    PeerLostError,
    RpcTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.agent.agent import Agent

T = TypeVar("T")

LEAST_LEFT_S = 0.001


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a call is made again. Only for functions that may run more than once: idempotent ones.

    The time limit of the call bounds all attempts together, and the waits between them.

    Args:
        attempts: how many there are at most, the first one included.
        on: classes of errors, of zrpc or of the function, after which the call is made again. A call that was cancelled
            never is.
        wait: how many seconds to wait before the second attempt. Each further wait is twice as long, and up to `wait`
            more by chance.
        max_wait: the longest wait in seconds.
        attempt_timeout: the time limit of each attempt in seconds; 0: what is left of the call's. Without it there is
            no time left for a second attempt where the first one has run into its time limit.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    attempts: int = 3
    on: tuple[type[Exception], ...] = (PeerLostError, ConnectionLostError, RpcTimeoutError, OverloadedError)
    wait: float = 0.1
    max_wait: float = 5.0
    attempt_timeout: float = 0.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or self.attempts < 1:
            raise ConfigError(f"attempts must be a whole number, 1 or more, not {self.attempts!r}")
        kinds = self.on if isinstance(self.on, tuple) else ()
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise ConfigError(f"on must be a tuple of exception classes, as in on=(PeerLostError,), not {self.on!r}")
        for name in ("wait", "max_wait"):
            check_timeout(getattr(self, name), name, "not at all")
        check_timeout(self.attempt_timeout, "attempt_timeout", "what is left of the call's limit")


def check_policy(policy: object) -> None:
    """Raise what is wrong with what `retry` was given.

    Raises:
        ConfigError: it is no `RetryPolicy`, or tenacity is not installed.
    """
    if not isinstance(policy, RetryPolicy):
        raise ConfigError(f"retry must be a zrpc.RetryPolicy, such as RetryPolicy(attempts=3), not {policy!r}")
    _tenacity()


def call(policy: RetryPolicy, limit_s: float, attempt: Callable[[float], T]) -> T:
    """What `attempt(seconds)` returns, tried as `policy` says on this thread.

    Args:
        policy: when to try again.
        limit_s: of all attempts together, in seconds; 0: none.
        attempt: makes the call with that time limit (0: none), and waits for it.

    Raises:
        Exception: what the last attempt raised.
    """
    limits = _Limits(policy, limit_s)
    return limits.retrying(_tenacity().Retrying, _sleep)(lambda: attempt(limits.next_s()))  # type: ignore[no-any-return]


def call_async(
    policy: RetryPolicy, limit_s: float, attempt: Callable[[float], Future[T]], agent: Agent, what: str
) -> Future[T]:
    """The same on the event loop of `agent`: a future, at once. `attempt` begins the call; `what` is its name."""
    limits = _Limits(policy, limit_s)
    result: Future[T] = Future()
    result.set_origin(what)

    async def once() -> T:
        return await attempt(limits.next_s())

    async def all_attempts() -> T:
        return await limits.retrying(_tenacity().AsyncRetrying, asyncio.sleep)(once)  # type: ignore[no-any-return]

    def end(make: Callable[[], T]) -> None:
        agent.completions.submit(lambda: settle(result, make))  # its callbacks may wait for others

    def fail(error: BaseException) -> None:
        def outcome() -> T:
            raise CallCancelledError(f"{what} was cancelled") if isinstance(error, CallCancelledError) else error

        end(outcome)

    cancel = agent.event_loop.run(all_attempts(), serving.get(), lambda value: end(lambda: value), fail)

    def cancelled() -> bool:
        cancel()
        return True

    result.cancel_by(cancelled)
    return result


class _Limits:
    """The time limits of the attempts of one call."""

    def __init__(self, policy: RetryPolicy, limit_s: float) -> None:
        outer = serving.get()
        self._policy = policy
        self._limit_s = limit_s if outer is None else outer.limit_s(limit_s)
        self._deadline = time.monotonic() + self._limit_s

    def next_s(self) -> float:
        """The time limit of the attempt that begins now, in seconds; 0: none."""
        own_s = self._policy.attempt_timeout
        if not self._limit_s:
            return own_s
        left_s = max(LEAST_LEFT_S, self._deadline - time.monotonic())
        return min(own_s, left_s) if own_s else left_s

    def retrying(self, kind: Any, sleep: Callable[[float], Any]) -> Any:
        """What tenacity makes of it."""
        tenacity = _tenacity()
        policy = self._policy
        stop: Any = tenacity.stop_after_attempt(policy.attempts)
        if self._limit_s:
            stop = stop | tenacity.stop_before_delay(self._limit_s)

        def is_worth_it(error: BaseException) -> bool:
            return isinstance(error, policy.on) and not isinstance(error, CallCancelledError)

        return kind(
            stop=stop,
            wait=tenacity.wait_exponential_jitter(initial=policy.wait, max=policy.max_wait, jitter=policy.wait),
            retry=tenacity.retry_if_exception(is_worth_it),
            sleep=sleep,
            reraise=True,
        )


def _sleep(seconds: float) -> None:
    with blocking():
        time.sleep(seconds)


def _tenacity() -> Any:
    try:
        import tenacity
    except ImportError as error:
        raise ConfigError(
            "retry needs the package tenacity, which is not installed here: pip install 'zrpc[retry]', or make the "
            "call again yourself"
        ) from error
    return tenacity
